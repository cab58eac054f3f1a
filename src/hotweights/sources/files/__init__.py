"""Files: safetensors, their headers, and directories of shards."""
