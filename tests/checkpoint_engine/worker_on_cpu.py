"""Our worker extension, and checkpoint-engine's own, on a device that checkpoint-engine knows no name for."""

from checkpoint_engine import worker
from parameter_server import CPU

from hotweights.engines.checkpoint_engine import CheckpointEngineWorker

worker.DeviceManager = CPU


class WorkerOnCPU(CheckpointEngineWorker):
    _device_uuid = "cpu"


class StockOnCPU(worker.VllmColocateWorkerExtension):
    _device_uuid = "cpu"
