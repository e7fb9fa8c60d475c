"""What a target's preset puts under a job, and which layout it takes on the GPUs at hand.

Everything that the job says itself wins. The trade-off: a layout is looked up and not searched for, since what is
fastest on a type of GPU is a measured matter; it is then checked by arithmetic like any other (`memory`).
"""

from distill_pipe.errors import UsageError
from distill_pipe.produce.gpus import GpuSet, parse_gpus
from distill_pipe.produce.model_config import count_parameters
from distill_pipe.produce.preset import Layout, Plain, Preset, load_preset

GIB = 1 << 30


def fill_in(plain: Plain) -> None:
    """Put the sampling and engine options of the target's preset, and with `gpus` its layout, under a job's own.

    Raises:
        UsageError: the target has no layout for these GPUs, or needs more of them.
    """
    name, gpus = plain.get("target"), plain.get("gpus")
    preset = load_preset(name) if isinstance(name, str) else None
    if preset is not None:
        _under(plain, "sampling", preset.sampling)
        _under(plain, "engine", preset.engine)
    if isinstance(gpus, str):
        given = parse_gpus(gpus)
        if "tensor_parallel_size" not in _group(plain, "engine"):
            _under(plain, "engine", choose_layout(str(name), preset, given).engine())
        plain.setdefault("workers", _workers(plain, given))


def choose_layout(name: str, preset: Preset | None, given: GpuSet) -> Layout:
    """The preset's layout for a type of GPU.

    Raises:
        UsageError: there is none, or it takes more GPUs than are given; the message has the numbers.
    """
    layout = None if preset is None else preset.layouts.get(given.gpu.name)
    if preset is None or layout is None:
        raise UsageError(f"no layout of {name} on {given.gpu.name} is known: set engine.tensor_parallel_size (and "
                         "workers), or give --gpu-memory in place of --gpus")
    if layout.devices > given.count:
        raise UsageError(f"{name} does not fit {given.count}x{given.gpu.name}: {_needs(preset, given)}it takes "
                         f"{layout.devices}x{given.gpu.name}: {describe(layout)}")
    return layout


def describe(layout: Layout) -> str:
    """A layout in words: `tensor parallel 16, expert parallel, on 2 machines`."""
    parts = [f"tensor parallel {layout.tp}"] if layout.devices > 1 else ["one GPU per engine"]
    parts += [f"pipeline parallel {layout.pp}"] * (layout.pp > 1) + ["expert parallel"] * layout.ep
    return ", ".join(parts) + (f", on {layout.nodes} machines" if layout.nodes > 1 else "")


def _needs(preset: Preset, given: GpuSet) -> str:
    if preset.config is None:
        return ""
    dtype = "bfloat16" if preset.dtype == "auto" else preset.dtype
    weights = count_parameters(preset.config).weight_bytes(dtype, preset.quantization)
    whole, each, room = (size / GIB for size in (weights, weights / given.count, given.gpu.bytes))
    return (f"{whole:,.1f} GiB of {preset.quantization or dtype} weights are {each:,.1f} GiB on each, which has "
            f"{room:,.1f}; ")


def _workers(plain: Plain, given: GpuSet) -> int:
    engine = _group(plain, "engine")
    tp, pp = (engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    if not isinstance(tp, int) or not isinstance(pp, int) or tp < 1 or pp < 1:
        return 1  # the job is refused for it when it is read
    if tp * pp > given.count:
        raise UsageError(f"an engine of {tp * pp} devices does not fit {given.count}x{given.gpu.name}; lower "
                         "engine.tensor_parallel_size or engine.pipeline_parallel_size")
    return given.count // (tp * pp)


def _under(plain: Plain, group: str, defaults: Plain) -> None:
    own = _group(plain, group)
    if isinstance(plain.get(group, {}), dict) and defaults:
        plain[group] = defaults | own


def _group(plain: Plain, name: str) -> Plain:
    found = plain.get(name)
    return found if isinstance(found, dict) else {}
