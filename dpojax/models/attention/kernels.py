"""The attention rule on vendors' kernels: splash on TPUs, cuDNN on GPUs.

The rule itself is `data.packing.visible`.

Legend: R rows, L row length, K lanes, H query heads, J kv heads, E head dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpojax.data.packing import PackShape
from dpojax.errors import ConfigError
from dpojax.models.attention.blocks import NO_WINDOW, SAVED, Kernel, Rows, blocked, causal, masked
from dpojax.models.attention.lanes import collect, dense_lanes, one_sequence_each, to_lanes
from dpojax.models.config import ModelConfig

LANE = 128  # splash's tile: lengths of rows are padded to its multiples


def by_window(attend, windows: tuple[int, ...]):
    """`attend` with a static window, chosen at run time among `windows`.

    So the layers of a scan share one program.

    Args:
      attend: (q, k, v, where, softcap=, window=) with window an int, or None.
      windows: every window that a layer has, 0 for none; () where no layer has one.
    """
    distinct = sorted(set(windows))
    kinds = [functools.partial(attend, window=w or None) for w in distinct]

    def chosen(q, k, v, where, window=None, *, softcap=None):
        if window is None:
            return attend(q, k, v, where, softcap=softcap, window=None)
        branches = [functools.partial(kind, softcap=softcap) for kind in kinds]
        which = jnp.argmax(jnp.asarray([w or NO_WINDOW for w in distinct]) == window)
        return (
            branches[0](q, k, v, where)
            if len(branches) == 1
            else jax.lax.switch(which, branches, q, k, v, where)
        )

    return chosen


# --- splash ---------------------------------------------------------------------------------------


def _slots_visible(q_ids, k_ids, *, prompt: int, response: int, lanes: int):
    """What slots [x | y_1 | y_2 ...] leave of the rule to the mask.

    The group is a segment id.
    """
    seen = q_ids >= k_ids
    for end in range(prompt + response, prompt + lanes * response, response):
        seen &= ~((q_ids >= end) & (k_ids >= prompt) & (k_ids < end))
    return seen


def _mask(length: int, visible: Callable[..., Any]):
    """A static mask that the kernel computes as it goes.

    It is an array where this version of splash has no such masks.
    """
    base = getattr(splash_attention_mask, "_ComputableMask", None)
    if base is None:
        index = np.arange(length)
        return splash.NumpyMask(np.asarray(visible(index[:, None], index[None, :])))

    class Computed(base):
        """Equal to itself alone."""

        __hash__ = object.__hash__

        def __init__(self):
            super().__init__(shape=(length, length), mask_function=visible)

        def __eq__(self, other):
            return self is other

    return Computed()


def _splash(q, k, v, segment, mask, *, softcap, interpret: bool):
    """Splash on [B, N, H, E] with one mask for all heads. N is a multiple of 128."""
    length, heads = q.shape[1:3]
    block = max(b for b in (1024, 896, 768, 640, 512, 384, 256, 128) if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=max(b for b in (512, 384, 256, 128) if block % b == 0),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=max(b for b in (512, 384, 256, 128) if block % b == 0),
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def heads_first(x):
        return x.transpose(0, 2, 1, 3)

    out = jax.vmap(kernel)(*map(heads_first, (q, k, v)), splash.SegmentIds(segment, segment))
    return heads_first(out)


def splash_lanes(shape: PackShape, windows: tuple[int, ...], *, interpret: bool) -> Kernel:
    """Shared rows on splash: K causal lanes a row.

    They are banded by the longest sequence; groups are told by segment ids.
    """

    def attend(q, k, v, lanes, *, softcap, window):
        rows, count, size = lanes.source.shape
        # No key further back than the longest sequence can be of the same group: those blocks are
        # skipped.
        band = min(window or size, size, shape.longest or size)
        padded = -(-size // LANE) * LANE

        def flat(x):
            return jnp.pad(
                x.reshape(rows * count, size, *x.shape[3:]),
                ((0, 0), (0, padded - size), (0, 0), (0, 0)),
            )

        segment = jnp.pad(lanes.segment.reshape(rows * count, size), ((0, 0), (0, padded - size)))
        mask = splash.LocalMask((padded, padded), (band - 1, 0), 0)
        q, k, v = (flat(to_lanes(x, lanes)) for x in (q, k, v))
        out = _splash(q, k, v, segment, mask, softcap=softcap, interpret=interpret)
        return collect(out[:, :size].reshape(rows, count, size, *out.shape[2:]), lanes)

    return Kernel(lambda rows: dense_lanes(rows, shape.num_lanes), by_window(attend, windows))


def splash_slots(shape: PackShape, *, interpret: bool) -> Kernel:
    """Rows of slots [x | y_1 | y_2] on splash.

    No token moves, and scores between the responses' slots are skipped.
    """
    assert shape.slots is not None
    prompt, response = shape.slots

    def attend(q, k, v, group, window=None, *, softcap=None):
        assert window is None  # index distance is not position distance in slots
        padding = -q.shape[1] % LANE

        def pad(x):
            return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))

        visible = functools.partial(
            _slots_visible, prompt=prompt, response=response, lanes=shape.num_lanes
        )
        mask = _mask(q.shape[1] + padding, visible)
        segment = jnp.pad(group, ((0, 0), (0, padding)))
        out = _splash(pad(q), pad(k), pad(v), segment, mask, softcap=softcap, interpret=interpret)
        return out[:, : q.shape[1]]

    return Kernel(lambda rows: rows.group, attend)


# --- cuDNN ----------------------------------------------------------------------------------------


def cudnn_sequences(
    shape: PackShape, windows: tuple[int, ...], *, implementation: str = "cudnn"
) -> Kernel:
    """Shared rows on jax.nn.dot_product_attention.

    Every prompt with a response is a causal sequence with a length.

    Args:
      implementation: "xla" for tests on a CPU.
    """
    longest = -(-shape.longest // 64) * 64

    def prepare(rows: Rows):
        lanes = one_sequence_each(rows, shape.num_lanes, shape.row_groups, longest)
        used = (lanes.segment > 0).reshape(-1, longest).sum(axis=1, dtype=jnp.int32)
        # an empty sequence is one zero token
        return lanes, jnp.maximum(used, 1).reshape(rows.group.shape[0], -1)

    def attend(q, k, v, where, *, softcap, window):
        assert softcap is None  # cuDNN through jax.nn has none
        lanes, lengths = where
        q, k, v = (to_lanes(x, lanes).reshape(-1, longest, *x.shape[2:]) for x in (q, k, v))
        lengths = lengths.reshape(-1)
        out = jax.nn.dot_product_attention(  # pyright: ignore[reportCallIssue]  # its overloads want a literal
            q,
            k,
            v,
            scale=1.0,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None or window >= longest else (window - 1, 0),
            implementation=implementation,
        )
        return collect(out.reshape(*lanes.source.shape, *out.shape[2:]), lanes)

    return Kernel(prepare, by_window(attend, windows))


# --- which, and where -----------------------------------------------------------------------------


def device_platform(device: Any) -> str:
    """The device's platform, which kernels are chosen by.

    "cuda": NVIDIA GPUs that cuDNN's attention runs on (Ampere and later); "gpu": others.
    """
    if device.platform != "gpu":
        return device.platform
    capability = str(getattr(device, "compute_capability", ""))  # 9.0; AMD's are gfx90a
    number = capability.partition(".")[0]
    return (
        "cuda"
        if device.device_kind.startswith("NVIDIA") and number.isdecimal() and int(number) >= 8
        else "gpu"
    )


def why_not(name: str, config: ModelConfig, *, dtype: str, layout: str) -> str:
    """Why a kernel cannot compute this model's attention on rows of this layout, or ""."""
    if name == "cudnn":
        if dtype != "bfloat16":
            return f"cuDNN needs model.dtype=bfloat16, not {dtype}"
        if config.head_dim > 128 or config.head_dim % 8:
            return f"cuDNN takes heads of up to 128 in eights, not {config.head_dim}"
        if config.attention_softcap is not None:
            return "cuDNN has no soft-capped scores"
        if layout in ("slots", "separate"):
            return f"cuDNN takes shared rows, not {layout}"
    if name == "splash" and layout == "slots" and any(config.windows):
        return "in slots, windows are not distances of a row"
    return ""


def choose(
    name: str, config: ModelConfig, *, dtype: str, layout: str, platform: str
) -> tuple[str, str]:
    """(the kernel that model.attention=`name` means on `platform`, the reason).

    The reason is said where there is a choice.

    Args:
      platform: as `device_platform` has it.
    Raises: ConfigError where a kernel is asked for by name and cannot do it.
    """
    fastest = {"tpu": "splash", "cuda": "cudnn"}.get(platform, "xla")
    if name == "auto":
        reason = why_not(fastest, config, dtype=dtype, layout=layout)
        if reason:
            return "xla", reason
        return fastest, f"on {platform}"
    reason = why_not(name, config, dtype=dtype, layout=layout)
    if name == "cudnn" and fastest != "cudnn":
        reason = f"cuDNN runs on NVIDIA GPUs (Ampere and later), this is {platform}"
    if reason:
        raise ConfigError(f"model.attention is {name!r}: {reason}; set 'auto' or 'xla'")
    return name, ""


def make_kernel(
    name: str, config: ModelConfig, shape: PackShape | None, *, platform: str
) -> Kernel:
    """The kernel for the rows of one device.

    Args:
      name: one that `choose` returned; "causal": plain sequences, one a row, and no other rows.
      shape: of the rows; None: any rows, which the kernels of vendors do not take.
      platform: cpu, gpu or tpu.
    """
    if name == "full":
        return masked()
    if name == "causal":
        return causal()
    if name == "splash" and shape is not None:
        interpret = platform != "tpu"
        if shape.slots is not None:
            return splash_slots(shape, interpret=interpret)
        return splash_lanes(shape, config.windows, interpret=interpret)
    if name == "cudnn" and shape is not None:
        return cudnn_sequences(shape, config.windows)
    # CPUs gain most from skipping; accelerators want larger matrix products, and rows side by side.
    if platform == "cpu":
        return blocked(block=128, chains=1)
    return blocked(block=256, chains=0)


def on_mesh(kernel: Kernel, mesh: Mesh, rows: tuple[str, ...], heads: tuple[str, ...]) -> Kernel:
    """The kernel on the rows and heads that each device holds.

    Sequences that are split over the mesh are joined for it.

    Where the heads are spread over the axis that sequences are split over, entering and leaving is
    the all-to-all of DeepSpeed Ulysses (arXiv:2309.14509).

    Args:
      rows: mesh axes over which the rows are spread.
      heads: mesh axes over which the heads are spread in attention, where their number divides.
    """
    if mesh.size == 1:
        return kernel
    by_row = P(rows)
    count = math.prod(mesh.shape[a] for a in heads)
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def attend(q, k, v, where, window=None, *, softcap=None):
        spread_over = ()
        size = 1
        if q.shape[2] % count == 0:
            spread_over = heads
            size = count
        split = P(rows, None, spread_over or None)
        keys = P(rows, None, spread_over or None)
        times = math.lcm(k.shape[2], size) // k.shape[2]
        # fewer key heads than devices: each device has all of them, and takes those of its queries
        if times > 1:
            keys = by_row

        def attend_here(q, k, v, where, *window):
            if times > 1:
                held = k.shape[2] * times // size
                place = jax.lax.axis_index(spread_over) * held + jnp.arange(held)
                k, v = (jnp.take(x, place // times, axis=2) for x in (k, v))
            return kernel.attend(q, k, v, where, *window, softcap=softcap)

        inputs = (q, k, v, where)
        if window is not None:
            inputs = (*inputs, window)
        specs = (split, keys, keys, by_row, P())[: len(inputs)]
        return mapped(attend_here, in_specs=specs, out_specs=split)(*inputs)

    return Kernel(
        lambda where: mapped(kernel.prepare, in_specs=by_row, out_specs=by_row)(where), attend
    )
