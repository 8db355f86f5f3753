"""What each family says of its rotary embedding and of its windows -> fields of ModelConfig."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpojax.errors import ConfigError
from dpojax.models.config import RopeScaling
from dpojax.models.families.fields import NUMBER, REQUIRED, Field, Fields
from dpojax.untrusted.plain_data import number_fault

# --- rotary embeddings ----------------------------------------------------------------------------


class _Given:
    """A rope_scaling or rope_parameters of a file: its fields are taken one by one."""

    def __init__(self, fields: Fields, given: Mapping[str, Any], known: Mapping[str, Any]):
        self.path = fields.path
        self.known = known
        self.left = dict(given)
        for name in ("rope_theta", "partial_rotary_factor"):
            self.left.pop(name, None)
        kind = self.left.pop("rope_type", self.left.pop("type", "default"))
        self.left.pop("type", None)
        if known["family"] == "phi3":  # whose first files have older names
            kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
        self.kind = kind
        self.longest = fields.take(
            Field("original_max_position_embeddings", int, known["max_positions"])
        )

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """The number of this name; `default` where the file has none.

        Raises: ConfigError naming the file and the field.
        """
        value: Any = self.left.pop(name, None)
        if value is None:
            value = default
        if value is REQUIRED:
            raise ConfigError(f"{self.path}: the rotary scaling {self.kind!r} lacks {name}")
        fault = number_fault(value, float)
        if fault is None and value <= 0 and not name.startswith("mscale"):
            fault = "it must be > 0"
        if fault is not None:
            raise ConfigError(
                f"{self.path}: the rotary scaling {self.kind!r} has {name}={value!r:.80}; {fault}"
            )
        return float(value)

    def original_and_factor(self) -> tuple[int, float]:
        """(the positions that the model was first made for, how often they fit the new ones)."""
        original = int(self.number("original_max_position_embeddings", self.longest))
        return original, self.number("factor", self.known["max_positions"] / original)


def _linear(given: _Given) -> RopeScaling:
    return RopeScaling("linear", given.number("factor"), given.known["max_positions"])


def _llama3(given: _Given) -> RopeScaling:
    return RopeScaling(
        "llama3",
        given.number("factor"),
        int(given.number("original_max_position_embeddings")),
        low_freq_factor=given.number("low_freq_factor"),
        high_freq_factor=given.number("high_freq_factor"),
    )


def _yarn(given: _Given) -> RopeScaling:
    original, factor = given.original_and_factor()

    def scale(m):
        if factor <= 1:
            return 1.0
        return 0.1 * m * math.log(factor) + 1

    mscale = given.number("mscale", 0.0)
    mscale_all = given.number("mscale_all_dim", 0.0)
    inferred = scale(1.0)
    if mscale and mscale_all:
        inferred = scale(mscale) / scale(mscale_all)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=given.number("beta_fast", 32.0),
        beta_slow=given.number("beta_slow", 1.0),
        truncate=bool(given.left.pop("truncate", True)),
        attention_factor=given.number("attention_factor", inferred),
    )


def _longrope(given: _Given) -> RopeScaling:
    original, factor = given.original_and_factor()
    inferred = 1.0
    if factor > 1:
        inferred = math.sqrt(1 + math.log(factor) / math.log(original))
    factors = tuple(map(float, given.left.pop("short_factor", None) or ()))
    given.left.pop("long_factor", None)
    if not factors:
        raise ConfigError(f"{given.path}: the rotary scaling 'longrope' has no short_factor")
    attention_factor = given.number("attention_factor", inferred)
    return RopeScaling(
        "longrope", factor, original, attention_factor=attention_factor, short_factors=factors
    )


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _scaling(
    fields: Fields, rope: dict[str, Any], known: Mapping[str, Any]
) -> tuple[RopeScaling | None, bool]:
    """(scaling, whether positions past max_positions cannot be computed).

    `rope` is a file's rope_scaling or rope_parameters.
    """
    given = _Given(fields, rope, known)
    scaling = None
    if given.kind in _SCALINGS:
        scaling = _SCALINGS[given.kind](given)
    elif given.kind == "dynamic":
        given.number("factor")
    elif given.kind != "default":
        raise ConfigError(
            f"{fields.path}: the rotary scaling {given.kind!r} is not one that this version"
            " computes"
        )
    if given.left:
        raise ConfigError(
            f"{fields.path}: the rotary scaling {given.kind!r} has {given.left}, which this version"
            " does not compute"
        )
    # "dynamic": as without scaling up to max_positions; past it the angles depend on the sequence's
    # length. "longrope": past the original context it takes other factors, for the whole sequence.
    return scaling, given.kind in ("dynamic", "longrope")


def plain_rope(
    fields: Fields,
    known: dict,
    *,
    theta="rope_theta",
    default_theta=10000.0,
    part="",
    default_part=1.0,
):
    """rope_theta, rope_scaling and rotary_dim.

    In the new spelling (rope_parameters) or the old one.

    Args:
      theta: the field of the base.
      part: the field of the share of a head that is turned; "": the family's code turns all of it,
        whatever a file says.
    """
    new = fields.take(Field("rope_parameters", dict, None))
    old = fields.take(Field("rope_scaling", dict, None))
    given = old or new or {}
    inner = Fields(given, fields.path)
    base = inner.take_float("rope_theta", fields.take_float(theta, default_theta))
    share = 1.0
    if part:
        share = inner.take_float("partial_rotary_factor", fields.take_float(part, default_part))
    scaling, hard = _scaling(fields, given, known)
    # transformers' code of these kinds reads the share in every family, and fails
    stretched = scaling is not None or hard
    if (
        stretched
        and not part
        and fields.values.get("partial_rotary_factor", given.get("partial_rotary_factor", 1)) != 1
    ):
        raise ConfigError(
            f"{fields.path}: partial_rotary_factor with a rotary scaling is not computed for this"
            " family"
        )
    rope = {"rope_theta": float(base), "rope_scaling": scaling, "hard_max_positions": hard}
    if hard and scaling is not None:
        rope["max_positions"] = scaling.original_max_positions
    if share != 1:
        rope["rotary_dim"] = int(known["head_dim"] * share)
    return rope


def neox_rope(fields: Fields, known: dict) -> dict[str, Any]:
    fields.take(Field("partial_rotary_factor", NUMBER, None))
    return plain_rope(fields, known, theta="rotary_emb_base", part="rotary_pct", default_part=0.25)


def gptj_rope(fields: Fields, known: dict) -> dict[str, Any]:
    del known
    return {"rope_theta": 10000.0, "rotary_dim": fields.take(Field("rotary_dim", int, 64))}


def phi3_rope(fields: Fields, known: dict) -> dict[str, Any]:
    return plain_rope(fields, known, part="partial_rotary_factor")


def mixtral_rope(fields: Fields, known: dict) -> dict[str, Any]:
    return plain_rope(fields, known, default_theta=1e6)


def gemma3_rope(fields: Fields, known: dict) -> dict[str, Any]:
    """Two bases: full layers stretch theirs, windowed layers have a local one."""
    new = fields.take(Field("rope_parameters", dict, None))
    old = fields.take(Field("rope_scaling", dict, None))
    theta = fields.take_float("rope_theta", 1e6)
    local = fields.take_float("rope_local_base_freq", 1e4)
    full = {**((new or {}).get("full_attention") or {}), **(old or {})}
    windowed = (new or {}).get("sliding_attention") or {}
    if set(new or {}) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{fields.path}: rope_parameters is {new}; it must hold full_attention and"
            " sliding_attention"
        )
    scaling, hard = _scaling(fields, full, known)
    if _scaling(fields, windowed, known) != (None, False):
        raise ConfigError(
            f"{fields.path}: windowed layers with a rotary scaling, {windowed}, are not computed by"
            " this version"
        )
    return {
        "rope_theta": Fields(full, fields.path).take_float("rope_theta", theta),
        "rope_scaling": scaling,
        "hard_max_positions": hard,
        "local_rope_theta": Fields(windowed, fields.path).take_float("rope_theta", local),
    }


# --- windows --------------------------------------------------------------------------------------


def _by_layer(
    fields: Fields, layers: int, window: int | None, is_windowed: Callable[[int], bool]
) -> tuple[int, ...]:
    """Windows by layer_types where the file has them, else by `is_windowed`."""
    types = fields.take(Field("layer_types", list, None))
    if types is None:
        types = ["full_attention"] * layers
        for i in filter(is_windowed, range(layers)):
            types[i] = "sliding_attention"
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise ConfigError(
            f"{fields.path}: layer_types is {types!r:.200}; it must name full_attention or"
            f" sliding_attention {layers} times"
        )
    if window is None and "sliding_attention" in types:
        raise ConfigError(
            f"{fields.path}: layer_types has sliding_attention, and there is no sliding_window"
        )
    size_of = {"sliding_attention": window or 0, "full_attention": 0}
    return tuple(size_of[kind] for kind in types)


def all_windows(default: int | None):
    def windows(fields: Fields, layers: int) -> tuple[int, ...]:
        return (fields.take(Field("sliding_window", int, default)) or 0,) * layers

    return windows


def _qwen_window(fields: Fields) -> int | None:
    used = fields.take(Field("use_sliding_window", bool, False))
    window = fields.take(Field("sliding_window", int, 4096))
    if used:
        return window
    return None


def qwen_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    window = _qwen_window(fields)
    first = fields.take(Field("max_window_layers", int, 28))
    return _by_layer(fields, layers, window, lambda i: window is not None and i >= first)


def qwen_moe_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    return (_qwen_window(fields) or 0,) * layers


def gemma2_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    return _by_layer(
        fields, layers, fields.take(Field("sliding_window", int, 4096)), lambda i: i % 2 == 0
    )


def gemma3_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    every = fields.take(Field("sliding_window_pattern", int, 6))
    return _by_layer(
        fields,
        layers,
        fields.take(Field("sliding_window", int, 4096)),
        lambda i: (i + 1) % every != 0,
    )
