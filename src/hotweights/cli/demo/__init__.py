"""The demo: the main job on real weights, each promise shown and checked."""
