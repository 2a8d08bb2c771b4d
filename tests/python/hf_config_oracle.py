"""Rotation of queries and keys by the rotary modules of the models in transformers.

`Oracle(config, layer_type)` finds the rotary module and the function that applies it, for an instance of a
configuration class. Nothing here uses posenc.
"""

import importlib
import inspect
import pkgutil
import re

import torch
import transformers.models
from transformers.configuration_utils import PreTrainedConfig

TEXT_KEYS = (
    "text_config",
    "thinker_config",
    "language_config",
    "llm_config",
    "vlm_config",
    "decoder",
)

# Configuration classes, and their rotary modules whose signature names another configuration class.
ROTARY_CLASSES = {
    "DeepseekOcr2VisionEncoderConfig": "DeepseekOcr2VisionRotaryEmbedding",
    "Ernie4_5_VL_MoeTextConfig": "Ernie4_5_VLMoeTextRotaryEmbedding",
    "Ernie4_5_VL_MoeVisionConfig": "Ernie4_5_VLMoeVisionRotaryEmbedding",
    "MiniMaxM3VLTextConfig": "MiniMaxM3VLRotaryEmbedding",
    "MuseGlimmerTextConfig": "MuseGlimmerTextRotaryEmbedding",
    "MuseSparkTextConfig": "MuseSparkTextRotaryEmbedding",
    "PaddleOCRTextConfig": "PaddleOCRRotaryEmbedding",
    "Qwen2_5OmniTextConfig": "Qwen2_5OmniRotaryEmbedding",
    "Qwen2_5OmniTalkerConfig": "Qwen2_5OmniRotaryEmbedding",
    "Qwen2_5_VLTextConfig": "Qwen2_5_VLRotaryEmbedding",
    "Qwen2VLTextConfig": "Qwen2VLRotaryEmbedding",
    "Qwen3OmniMoeTextConfig": "Qwen3OmniMoeThinkerTextRotaryEmbedding",
    "Qwen3OmniMoeTalkerCodePredictorConfig": "Qwen3OmniMoeRotaryEmbedding",
    "Qwen3OmniMoeTalkerTextConfig": "Qwen3OmniMoeTalkerRotaryEmbedding",
    "Qwen3OmniMoeCode2WavConfig": "Qwen3OmniMoeRotaryEmbedding",
    "Step3p7TextConfig": "Step3p7RotaryEmbedding",
}

# Configurations without a modelling file of their own, and the model that runs them.
MODELLED_BY = {
    "exaone": "llama",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "sarvam_mla": "deepseek_v3",
    "sarvam_moe": "glm4_moe",
}


class NotRotated(Exception):
    """The layer has no rotary embedding."""


class Fails(Exception):
    """transformers' own module fails with the configuration."""


class NoOracle(Exception):
    """The rotary module of the class is not a plain rotation of queries and keys by position."""


def configuration_classes():
    """(folder, class) of every configuration class."""
    for folder in sorted(module.name for module in pkgutil.iter_modules(transformers.models.__path__) if module.ispkg):
        package = importlib.import_module(f"transformers.models.{folder}")
        for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
            if not module.startswith("configuration_"):
                continue
            module = importlib.import_module(f"transformers.models.{folder}.{module}")
            for cls in list(vars(module).values()):
                if inspect.isclass(cls) and issubclass(cls, PreTrainedConfig) and cls.__module__ == module.__name__:
                    yield folder, cls


def modelling_of(config):
    path = type(config).__module__
    name = path.rsplit(".configuration_", 1)[1]
    if name in MODELLED_BY:
        name = MODELLED_BY[name]
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    try:
        return importlib.import_module(path.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:
        raise NotRotated(f"{path} has no modelling file") from None


def rotary_class(config):
    """The class of the rotary module of a configuration's model."""
    modelling = modelling_of(config)
    found = [
        cls
        for cls in vars(modelling).values()
        if inspect.isclass(cls)
        and cls.__module__ == modelling.__name__
        and re.search("Rotary|RopePosition", cls.__name__)
    ]
    name = type(config).__name__
    if name in ROTARY_CLASSES:
        return getattr(modelling, ROTARY_CLASSES[name])

    def annotation(cls):
        parameter = inspect.signature(cls.__init__).parameters.get("config")
        return "" if parameter is None else str(parameter.annotation)

    named = [cls for cls in found if re.search(rf"\b{name}\b", annotation(cls))]
    if len(named) == 1:
        return named[0]
    if not named and getattr(config, "rope_parameters", None) is not None and len(found) == 1:
        return found[0]
    raise NotRotated(f"no rotary module of {modelling.__name__} takes a {name}")


def text_config_of(config):
    """The configuration of the text model inside `config`, or `config` itself."""
    for key in TEXT_KEYS:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            return text_config_of(inner)
    return config


def layer_types_of(config):
    """The values of layer_type whose rotations may differ, or [None]."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [
        key
        for key, value in parameters.items()
        if isinstance(value, dict) or (value is None and key.endswith("attention"))
    ]
    if nested:
        return sorted(nested)
    types = getattr(config, "layer_types", None)
    return sorted(set(types)) if types and len(set(types)) > 1 else [None]


def is_rotated(config, layer_type):
    """Whether the attention of layers of this type is rotated, from the conditions in the modelling files."""
    kind = type(config).__name__
    if layer_type in ("linear_attention", "conv"):
        return False
    full = layer_type == "full_attention"
    if kind in ("Exaone4Config", "ExaoneMoeConfig", "Kolibri1Config"):
        return not full or config.sliding_window is None
    if kind in ("AfmoeConfig", "FlintConfig", "Cohere2Config", "Cohere2MoeConfig", "LaraMiniConfig"):
        return not full
    if kind == "BeamConfig":
        return config.rope_parameters[layer_type] is not None
    if kind in ("Llama4TextConfig", "SmolLM3Config", "MistralLarge4TextConfig"):
        return any(rotated for t, rotated in zip(config.layer_types, config.no_rope_layers) if layer_type in (None, t))
    if hasattr(config, "layer_rope_theta"):
        return any(theta for t, theta in zip(config.layer_types, config.layer_rope_theta) if layer_type in (None, t))
    if kind == "KimiLinearConfig":
        return False
    if kind == "GraniteMoeHybridConfig":
        return config.position_embedding_type == "rope"
    if kind == "EsmConfig":
        return config.position_embedding_type == "rotary"
    return True


def may_be_rotary(config):
    """Whether a configuration has rope_parameters or a rotary module."""
    if getattr(config, "rope_parameters", None):
        return True
    try:
        return rotary_class(config) is not None
    except NotRotated:
        return False


class Oracle:
    """Computes `scores(q, k, positions)` for layers of one type."""

    def __init__(self, config, layer_type=None):
        if not is_rotated(config, layer_type):
            raise NotRotated(f"layers of type {layer_type} of {type(config).__name__} are not rotated")
        self.config = config
        self.layer_type = layer_type
        self.modelling = modelling_of(config)
        self.name = type(config).__name__
        cls = rotary_class(config)
        if "Parameter" in cls.__name__ or cls.__name__ in NO_ORACLE:
            raise NoOracle(NO_ORACLE.get(cls.__name__, cls.__name__))
        try:
            self.rotary = cls(config)
        except Exception as error:
            raise Fails(f"{cls.__name__}: {type(error).__name__}: {error}") from error
        parameters = inspect.signature(cls.forward).parameters
        self.by_layer = "layer_type" in parameters and parameters["layer_type"].default is inspect.Parameter.empty
        self.by_layer = self.by_layer or (hasattr(self.rotary, f"{layer_type}_inv_freq"))
        self.source = inspect.getsource(cls)
        self.axial = "compute_axial_rope_parameters" in self.source
        axes = re.search(r"position_ids\.expand\((\d|len)", self.source)
        self.num_axes = 2 if self.axial else (1 if axes is None or axes[1] == "len" else int(axes[1]))

    def tables(self, positions):
        """cos and sin for positions [axes, S], or another form of table if the apply function takes one."""
        positions = torch.as_tensor(positions)
        length = positions.shape[1]
        x = torch.zeros(1, length, 8)
        if self.axial:
            ids = positions.T
            return self.rotary(x, ids[None] if self.name == "Gemma4VisionConfig" else ids)
        ids = positions[0][None] if self.num_axes == 1 else positions[:, None]
        if self.name in ("GPTJConfig", "CodeGenConfig"):
            return self.rotary(x, ids)
        return self.rotary(x, ids, self.layer_type) if self.by_layer else self.rotary(x, ids)

    def inv_freq(self):
        for name in (f"{self.layer_type}_inv_freq", "inv_freq"):
            if hasattr(self.rotary, name):
                return getattr(self.rotary, name)
        raise NoOracle("no frequencies")

    def head_dim(self):
        """Channels of the tensors that are rotated."""
        config = self.config
        if self.layer_type is not None and getattr(config, "is_heterogeneous", False):
            for key in (self.layer_type,):
                try:
                    config = config.per_layer_config[key]
                except (ValueError, KeyError):
                    pass

        def get(key):
            try:
                return getattr(config, key, None)
            except Exception:
                return None

        if self.name == "NomicBertConfig":
            return get("head_dim")
        width = "embed_dim" if self.name == "Qwen2VLVisionConfig" else "hidden_size"
        return get("qk_rope_head_dim") or get("head_dim") or get(width) // get("num_attention_heads")

    def rotated(self, q, k, positions):
        """q and k, [S, D] float32, rotated by the model's own function. Channels may come out in another order."""
        mod, name = self.modelling, self.name
        q, k = q[None, None], k[None, None]  # [1, 1, S, D]
        tables = self.tables(positions)
        if self.axial:
            cos, sin = (table.reshape(-1, table.shape[-1]) for table in tables)
            if hasattr(mod, "apply_multidimensional_rope"):
                ids = torch.as_tensor(positions).T[None]
                apply = mod.apply_multidimensional_rope
                return tuple(apply(x.transpose(1, 2), cos[None], sin[None], ids)[0, :, 0] for x in (q, k))
            if hasattr(mod, "apply_rotary_pos_emb_2d"):
                q, k = mod.apply_rotary_pos_emb_2d(q, k, cos, sin)
                return q[0, 0], k[0, 0]
            if hasattr(mod, "apply_rotary_pos_emb_2d_self_attn"):
                q, k = mod.apply_rotary_pos_emb_2d_self_attn(q, k, cos, sin)
                return q[0, 0], k[0, 0]
            if hasattr(mod, "apply_rotary_pos_emb_vision"):
                q, k = mod.apply_rotary_pos_emb_vision(q[0].transpose(0, 1), k[0].transpose(0, 1), cos, sin)
                return q[:, 0], k[:, 0]
            q, k = mod.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)
            return q[0, 0], k[0, 0]
        if name in ("GPTJConfig", "CodeGenConfig"):
            sin, cos = tables
            width = self.config.rotary_dim

            def part(x):
                x = x.transpose(1, 2)
                x = torch.cat([mod.apply_rotary_pos_emb(x[..., :width], sin, cos), x[..., width:]], -1)
                return x[0, :, 0]

            return part(q), part(k)
        if torch.is_tensor(tables):  # complex
            if name == "Llama4TextConfig":
                q, k = mod.apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), tables)
                return q[0, :, 0], k[0, :, 0]
            q, k = mod.apply_rotary_emb(q, k, tables)
            return q[0, 0], k[0, 0]
        cos, sin = tables
        if name in ("PersimmonConfig", "PhiConfig", "StableLmConfig"):  # attention passes the rotated part alone
            width = cos.shape[-1]
            rotated = mod.apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
            return tuple(torch.cat([part, x[..., width:]], -1)[0, 0] for part, x in zip(rotated, (q, k)))
        interleave = getattr(mod, "apply_rotary_pos_emb_interleave", None)
        if interleave is not None and "Audio" not in name and getattr(self.config, "rope_interleave", True):
            q, k = interleave(q, k, cos, sin)
        elif "k" not in inspect.signature(mod.apply_rotary_pos_emb).parameters:
            q, k = (mod.apply_rotary_pos_emb(x, cos, sin) for x in (q, k))
        else:
            q, k = mod.apply_rotary_pos_emb(q, k, cos, sin)
        return q[0, 0], k[0, 0]

    def scores(self, q, k, positions):
        try:
            with torch.no_grad():
                q, k = self.rotated(q, k, positions)
        except Exception as error:
            raise Fails(f"{self.name}: {type(error).__name__}: {error}") from error
        return q.double() @ k.double().T


# Rotary modules whose angles are not positions times frequencies, and the reason.
NO_ORACLE = {
    "DINOv3ViTRopePositionEmbedding": "angles of coordinates",
    "EomtDinov3RotaryEmbedding": "angles of coordinates",
    "Sapiens2RopePositionEmbedding": "angles of coordinates",
    "EfficientLoFTRRotaryEmbedding": "angles of an image's grid",
    "MusicFlamingoRotaryEmbedding": "angles of timestamps",
    "EsmFold2RotaryEmbedding": "angles of coordinates",
    "Llama4VisionRotaryEmbedding": "a class token without rotation",
}
