"""DCP: directories written by ``torch.distributed.checkpoint``, read by slices; nothing is put together first."""
