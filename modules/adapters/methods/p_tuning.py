"""P-tuning: prompt tuning whose vectors come out of a small network (arXiv:2103.10385v1, Sec. 3.2).

    P = MLP(E)                                      E [n, D], trained; P [n, D] stands in front of the text
    P_i = MLP([LSTM(E_1 … E_i); LSTM(E_i … E_n)])   --prompt-encoder lstm: the paper's, which reads E both ways

Vectors trained one by one lie where they began and know nothing of each other; the network moves all of them at once
and ties them together, which makes training less dependent on the start. It is needed for training only: what is saved
is P, n · D numbers (82 thousand for 20 virtual tokens in Llama 3 8B), and generation is that of prompt tuning. Trained
are, with H = --encoder-size (default D),

    mlp     n D + (D H + H) + (H² + H) + (H D + D)            three layers with ReLU between: 50 million in Llama 3 8B
    lstm    n D + 2 layers, both ways, and two layers          with --dropout between the LSTM's; 772 million there

so this is the method with the heaviest training for the lightest result. The sizes, the starts and the names of the
parts are PEFT's. An adapter that has been saved holds no network: to go on training one, --resume the run.
"""

import torch
from torch import Tensor, nn

from modules.adapters import virtual_tokens
from modules.adapters.options import Options
from modules.adapters.virtual_tokens import KEY, add_embedding, check_count, check_encoder, config_of, load_prompt

PEFT_TYPE = "P_TUNING"
VIRTUAL_TOKENS = True
READS = ("num_virtual_tokens", "prompt_encoder", "encoder_size", "dropout")  # this one with the LSTM
LSTM_LAYERS = 2

load = load_prompt


class PromptEncoder(nn.Module):
    """() → [n, D]."""

    def __init__(self, count: int, dim: int, size: int, kind: str, dropout: float, dtype: torch.dtype):
        super().__init__()
        like = dict(dtype=dtype)
        self.kind, self.size, self.dropout = kind, size, dropout
        self.embedding = nn.Embedding(count, dim, **like)
        if kind == "lstm":
            ways = dict(bidirectional=True, batch_first=True, dropout=dropout)
            self.lstm_head = nn.LSTM(dim, size, num_layers=LSTM_LAYERS, **ways, **like)
            layers = [nn.Linear(2 * size, 2 * size, **like), nn.ReLU(), nn.Linear(2 * size, dim, **like)]
        else:
            layers = [nn.Linear(dim, size, **like), nn.ReLU(), nn.Linear(size, size, **like), nn.ReLU()]
            layers.append(nn.Linear(size, dim, **like))
        self.mlp_head = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        x = self.embedding.weight
        if self.kind == "lstm":
            x = self.lstm_head(x[None])[0][0]
        return self.mlp_head(x)


def check(options: Options) -> None:
    check_count(options.num_virtual_tokens)
    check_encoder(options)
    if not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout {options.dropout} must lie in [0, 1)")


def add(model: nn.Module, options: Options) -> list[str]:
    virtual_tokens.check(model, options.num_virtual_tokens)
    kind = options.prompt_encoder or "mlp"
    if kind not in ("mlp", "lstm"):
        raise ValueError(f"--prompt-encoder {kind!r}: of P-tuning it is mlp or lstm (without one it is prompt tuning)")
    dim = model.config.hidden_size
    size = options.encoder_size or dim
    encoder = PromptEncoder(options.num_virtual_tokens, dim, size, kind, options.dropout, options.dtype)
    return add_embedding(model, options.num_virtual_tokens, encoder)


@torch.no_grad()
def export(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    prompt = model.model.embed_tokens.prompt
    training = prompt.training
    table = prompt.eval()()  # without dropout
    prompt.train(training)
    network = {}
    if isinstance(prompt, PromptEncoder):
        network = {"encoder_reparameterization_type": prompt.kind.upper(), "encoder_hidden_size": prompt.size}
        network |= {"encoder_num_layers": LSTM_LAYERS, "encoder_dropout": prompt.dropout}
    return config_of(model, PEFT_TYPE) | network, {KEY: table.detach()}
