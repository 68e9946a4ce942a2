"""DeepSpeed's configuration: every value that matters is written out, and a user's JSON cannot change the result.

DeepSpeed fills what is left unset with defaults of its own (it clips gradients at 1.0), and a JSON with its own
scheduler silently replaces the recipe's. So the recipe stays in the component's settings; a JSON may say how
memory and communication are arranged, and anything else in it is refused by name.
"""

import json
from pathlib import Path
from typing import Any, Literal

_ZERO = (
    "allgather_bucket_size allgather_partitions contiguous_gradients ignore_unused_parameters "
    "log_trace_cache_warnings memory_efficient_linear offload_optimizer offload_param overlap_comm "
    "reduce_bucket_size reduce_scatter round_robin_gradients "
    "stage3_gather_16bit_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_model_persistence_threshold stage3_module_granularity_threshold "
    "stage3_param_persistence_threshold stage3_prefetch_bucket_size "
    "stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce "
    "zero_hpz_partition_size"
)
_FREE = {f"zero_optimization.{name}" for name in _ZERO.split()} | {
    "aio",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
}
"""What arranges memory and communication, or tells of them, and leaves the numbers alone (DeepSpeed 0.19)."""
_OFF = ("fp16", "amp")
"""Sections that many a JSON carries along switched off."""
_NOT_YOURS = {
    "optimizer": "it is AdamW with the keys learning_rate and weight_decay",
    "scheduler": "it would replace the cosine schedule; the keys are learning_rate and warmup_ratio",
    "train_batch_size": "the keys are global_batch and tokens_per_row",
    "fp16": "the key is precision (fp32 or bf16)",
    "amp": "the key is precision (fp32 or bf16)",
}
_KEYS = {
    "gradient_clipping": "gradient_clipping",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "precision",
    "train_micro_batch_size_per_gpu": "tokens_per_row",
    "gradient_accumulation_steps": "tokens_per_row",
}
"""Where the setting lives of a value that a JSON may only repeat."""


def deepspeed_config(
    zero_stage: int,
    gradient_clipping: float,
    bf16: bool,
    user: dict[str, Any] | None = None,
    offload: Literal["no", "cpu", "pinned"] = "no",
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: ours, with what `user` (a parsed JSON) adds.

    `offload`: whether the optimizer works on the host, and whether what travels there is pinned.

    Values "auto", as the transformers Trainer writes them, mean ours. Raises ValueError that names the key for
    whatever the JSON must not say.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if offload != "no":
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": offload == "pinned"}
    return _merged(ours, _without_auto(user or {}), "")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError says what is wrong with it."""
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _merged(ours: dict[str, Any], user: dict[str, Any], prefix: str) -> dict[str, Any]:
    out = dict(ours)
    for name, value in user.items():
        key = f"{prefix}{name}"
        if key in _OFF and isinstance(value, dict) and not value.get("enabled"):
            continue
        if key in _NOT_YOURS:
            raise ValueError(f"the DeepSpeed JSON sets {key!r}: {_NOT_YOURS[key]}")
        known = ours.get(name)
        if isinstance(known, dict):
            if not isinstance(value, dict):
                raise ValueError(f"the DeepSpeed JSON sets {key!r} to {value!r}; it is an object")
            out[name] = _merged(known, value, f"{key}.")
        elif key in _FREE:
            out[name] = value
        elif name not in ours:
            raise ValueError(
                f"the DeepSpeed JSON sets {key!r}, which may change the result or is not known here: leave it out"
            )
        elif value != known:
            way_out = f"the key {_KEYS[key]} says it" if key in _KEYS else "it cannot be changed"
            raise ValueError(f"the DeepSpeed JSON sets {key} to {value!r}, here it is {known!r}: {way_out}")
    return out


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value != "auto"
    }
