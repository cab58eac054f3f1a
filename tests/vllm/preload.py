"""What every engine process imports: once, by the server that they are forked from."""

import hotweights.engines.vllm.loader  # noqa: F401
