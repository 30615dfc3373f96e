"""What vision-language models share: a Llama that reads the features of images among its tokens.

The vision tower makes features of an image, the projector brings them to the Llama's width, and they take the places of
the image tokens in the embedded text. The rest is the Llama of models/llama.py. A model says which parts it has and how
it makes features (models/llava.py, models/smolvlm.py).

B batch, T tokens, D width of the Llama, V vocabulary, I images, C channels, S image size, P features of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.clip_vit import CLIPBlock, CLIPVisionConfig, CLIPVisionModel
from models.llama import LlamaBlock, LlamaConfig, LlamaForCausalLM
from models.siglip_vit import SiglipVisionConfig, SiglipVisionModel
from modules.attention import KVCache, SequenceLayout
from modules.image_tokens import Images, put_features

# Published configurations leave out what equals transformers' defaults, which are Llama 1's.
_LLAMA_DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "num_attention_heads": 32}


@dataclass(frozen=True)
class VisionLanguageConfig:
    text: LlamaConfig
    vision: CLIPVisionConfig | SiglipVisionConfig
    image_token: int
    """Id of the token that an image's features take the place of."""

    # What data and generation ask of any model.
    @property
    def max_length(self) -> int:
        return self.text.max_length

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def tie_word_embeddings(self) -> bool:
        return self.text.tie_word_embeddings


def sections(config: dict, kind: str) -> tuple[dict, dict]:
    """(text_config, vision_config) of a config.json. Raises ValueError where one is missing or is no Llama's."""
    if missing := [key for key in ("text_config", "vision_config") if not isinstance(config.get(key), dict)]:
        raise ValueError(f"config.json lacks {', '.join(missing)}: not a complete {kind} configuration")
    text = _LLAMA_DEFAULTS | config["text_config"]
    if (found := text.get("model_type", "llama")) != "llama":
        raise ValueError(f"the language model in config.json is {found!r}; supported: 'llama'")
    return text, config["vision_config"]


class VisionLanguageModel(nn.Module):
    """A vision tower, a projector and a Llama with its language-model head."""

    parts: dict[str, str]
    """Which modules the parts "vision", "projector" and "language" are."""

    def __init__(self, config: VisionLanguageConfig, model: nn.Module):
        """`model` holds the three parts, and `image_features` makes [I, P, D] of pixel values [I, C, S, S]."""
        super().__init__()
        self.config = config
        self.model = model
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        layout: SequenceLayout | None = None,
        caches: list[KVCache] | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm, for token ids [B, T] and the images in them (`place_images`)."""
        llama = self.get_submodule(self.parts["language"])
        hidden_BTD = llama.embed_tokens(input_ids)
        if images is not None:
            hidden_BTD = put_features(hidden_BTD, self.model.image_features(images.pixel_values), images.positions)
        return llama.run_embedded(hidden_BTD, layout, caches)

    logits, head = LlamaForCausalLM.logits, LlamaForCausalLM.head  # a change of them there is one here, too

    @property
    def vision_tower(self) -> CLIPVisionModel | SiglipVisionModel:
        return self.get_submodule(self.parts["vision"])

    @property
    def projector(self) -> nn.Module:
        return self.get_submodule(self.parts["projector"])

    @property
    def language_model(self) -> LlamaForCausalLM:
        """The Llama with its head, for all that takes a Llama: activation memory, streamed weights, fused blocks.

        It shares its modules with this model, but a new `lm_head` must be put into this model; and names differ.
        """
        return LlamaForCausalLM(self.config.text, self.get_submodule(self.parts["language"]), self.lm_head)

    def part_of(self, name: str) -> str:
        """The part that a module or parameter belongs to, by its name; the head is the language model's."""
        return next((part for part, module in self.parts.items() if f"{name}.".startswith(f"{module}.")), "language")

    @property
    def blocks(self) -> list[CLIPBlock | LlamaBlock]:
        """Of both towers; `vision_tower.blocks` and `language_model.blocks` are those of one."""
        return [*self.vision_tower.blocks, *self.language_model.blocks]

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the config says so; call again after replacing either."""
        self.language_model.tie_weights()

    def make_caches(self, batch: int, slots: int) -> list[KVCache]:
        """Empty key/value caches, one per block of the Llama, for texts of up to `slots` tokens, images included."""
        return self.language_model.make_caches(batch, slots)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start from scratch: each tower as its family does, the projector as the Llama."""
        self.vision_tower.init_weights(generator)
        self.language_model.init_weights(generator)
        self.projector.init_weights(self.config.text.initializer_range, generator)

    # Where checkpoints keep these parameters: our prefix → theirs. A model without a checkpoint is saved in the first.
    names_on_disk: tuple[dict[str, str], ...] = ({},)
    names_read: dict[str, str] | None = None
    """The one that the weights were loaded from."""
    unread = ()
