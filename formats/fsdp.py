"""FSDP2: weights, gradients and optimizer of a model, split over all processes.

Apart from processes.py, so that evaluate.py, which does not need it, starts a second sooner.
"""

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from formats.processes import require_untied


def shard(model, processes):
    """Split a model over all processes by layer (FSDP2), and copy rank 0's weights there; other ranks' may be on "meta".
    Weights, gradients and their sums stay float32; layers compute in processes.dtype."""
    require_untied(model.config.text_config)
    weights = model.state_dict() if processes.rank == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    policy = MixedPrecisionPolicy(None if processes.dtype == torch.float32 else processes.dtype, torch.float32)
    tower = model.vision_tower.encoder["layers"][:-1]  # the last one never runs
    for part in [*tower, *model.language_model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=processes.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def whole_state_dict(model):
    """Gather a sharded model's weights on rank 0's CPU. All processes must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
