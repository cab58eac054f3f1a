"""DCP directories written by torch itself, in one process; also of tensors in many parts, as many ranks write them."""

import itertools
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class InParts(torch.Tensor):
    """A tensor that is saved in parts: ``cuts`` are the indices at which each dimension is cut."""

    @staticmethod
    def __new__(cls, tensor, cuts, transposed=False):
        return torch.Tensor._make_subclass(cls, tensor)

    def __init__(self, tensor, cuts, transposed=False):
        edges = [[0, *sorted(set(at)), length] for at, length in zip(cuts, tensor.shape, strict=True)]
        spans = [list(itertools.pairwise(each)) for each in edges]
        self.parts = {}
        for box in itertools.product(*spans):
            part = tensor[tuple(slice(*span) for span in box)].contiguous()
            if transposed and part.dim() > 1:
                part = part.transpose(0, -1).contiguous().transpose(0, -1)
            self.parts[torch.Size(start for start, _ in box)] = part

    def __create_write_items__(self, fqn, _):  # torch's protocol
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=part.shape),
                    properties=TensorProperties(dtype=part.dtype),
                    size=self.shape,
                ),
            )
            for offsets, part in self.parts.items()
        ]

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(offsets, part.shape) for offsets, part in self.parts.items()]

    def __get_tensor_shard__(self, index):
        return self.parts[index.offset]


def save_dcp(folder, state, *, files=1, **options):
    """Save a state dict; its tensors lie in so many files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it saves without a process group.
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=files, sync_files=False, **options))
    return folder


def load_dcp(folder, tensors):
    """What torch's own ``dcp.load`` puts into tensors of these dtypes and shapes."""
    state = {name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)
    return state


class OfRank(torch.Tensor):
    """What one rank holds of an ``InParts``: one of its parts, or none."""

    @staticmethod
    def __new__(cls, tensor, offsets):
        return torch.Tensor._make_subclass(cls, tensor)

    def __init__(self, tensor, offsets):
        self.parts = {offsets: tensor.parts[offsets].contiguous()} if offsets is not None else {}

    __create_write_items__ = InParts.__create_write_items__
    __create_chunk_list__ = InParts.__create_chunk_list__
    __get_tensor_shard__ = InParts.__get_tensor_shard__


def save_rank_parts(folder, state, ranks, **options):
    """What so many ranks write by ``HuggingFaceStorageWriter(save_distributed=True)``, each its parts."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, **options)
    planners, plans = [], []
    for rank in range(ranks):
        held = {}
        for name, tensor in state.items():
            held[name] = tensor if isinstance(tensor, InParts) else tensor.contiguous()
            if isinstance(tensor, InParts):
                offsets = [*tensor.parts]
                assert len(offsets) <= ranks  # torch's writer keeps one part of each tensor in a file.
                held[name] = OfRank(tensor, offsets[rank] if rank < len(offsets) else None)
        planners.append(dcp.DefaultSavePlanner())
        planners[-1].set_up_planner(held, writer.storage_meta(), rank == 0)
        writer.reset(None)
        writer.set_up_storage_writer(rank == 0)
        plans.append(writer.prepare_local_plan(planners[-1].create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    written = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for planner, plan in zip(planners, plans, strict=True)
    ]
    writer.finish(metadata, written)
    return folder
