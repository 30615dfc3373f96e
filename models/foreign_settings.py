"""Settings of a config.json that a model would ignore although they change what it should compute."""

from collections.abc import Collection

# Settings of Llama's relatives that change the arithmetic, unless they are null or have the value of their group.
NULL = ("sliding_window", "attention_multiplier", "query_pre_attn_scalar", "attn_logit_softcapping")
NULL += ("final_logit_softcapping", "scale_depth", "clip_qkv")
FALSE = ("use_sliding_window", "rope_interleaved", "attn_temperature_tuning", "use_parallel_residual", "parallel_attn")
FALSE += ("qk_norm", "use_qk_norm", "qk_layernorm")
ONE = ("no_rope_layers", "partial_rotary_factor", "logits_scaling", "logit_scale", "embedding_multiplier")
ONE += ("residual_multiplier", "scale_emb")
NEUTRAL = dict.fromkeys(NULL, ()) | dict.fromkeys(FALSE, (False,)) | dict.fromkeys(ONE, (1,))
NEUTRAL |= {"layer_types": ("full_attention",), "attention_dropout": (0,)}
NEUTRAL |= {"num_local_experts": (0, 1), "num_experts": (0, 1)}


def refuse_foreign_settings(config: dict, implemented: Collection[str] = ()) -> None:
    """Raise ValueError for settings that change the arithmetic, unless the model has `implemented` them."""
    foreign = []
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        if key not in implemented and any(v is not None and v not in neutral for v in values):
            foreign.append(f"{key} {value!r}")
    if foreign:
        raise ValueError(f"config.json has {', '.join(foreign)}, which this model does not compute")
