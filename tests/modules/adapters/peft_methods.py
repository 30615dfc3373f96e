"""What every method is held to: 20 training steps beside a peft loop, and folders that open on both sides."""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.virtual_tokens import virtual_ids
from modules.loss import linear_cross_entropy
from tests.models.test_llama import load, make_pair

STEPS = 20


def ids(seed=3):
    return torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(seed))


def behind_virtual(model, ids):
    """Rows as our data path makes them: virtual tokens, where the model has some, stand in front."""
    return torch.cat([torch.tensor(virtual_ids(model), dtype=torch.long).expand(len(ids), -1), ids], dim=1)


def hidden_of(model, ids):
    """Our model's hidden states at the real tokens."""
    return model(behind_virtual(model, ids))[:, -ids.shape[1] :]


def logits_of(model, ids):
    """At the real tokens, of our models or transformers'."""
    if hasattr(model, "logits"):
        return model.logits(hidden_of(model, ids))
    return model(ids).logits[:, -ids.shape[1] :]  # a prompt-tuned peft model returns those of virtual tokens, too


def logits(model, seed=3):
    return logits_of(model.eval(), ids(seed))


def loss_of(model, ids):
    """The mean loss of tokens 1, 2, …: transformers' models by their logits, ours by hidden states and head."""
    if not hasattr(model, "logits"):
        return F.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
    return linear_cross_entropy(hidden_of(model, ids), model.lm_head, targets) / ids[:, 1:].numel()


def make_adapter(folder, reference, seed, **settings):
    """A random LoRA as peft saves it."""
    config = dict(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM") | settings
    model = get_peft_model(copy.deepcopy(reference), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def our_name(name):
    """Of a parameter in a peft model."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def weights_by_our_name(model):
    """Of a peft model."""
    return {our_name(name): p for name, p in model.named_parameters()}


def adamw(model, lr):
    return torch.optim.AdamW(trained(model).values(), lr=lr, weight_decay=0.0)


def train(model, optimizer, steps=STEPS):
    """The losses of `steps` steps on random tokens."""
    model.train()
    losses = []
    for step in range(steps):
        loss = loss_of(model, ids(100 + step % 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_follows_peft(
    tmp_path,
    config,
    *,
    method=None,
    lr=3e-3,
    theirs_adamw=adamw,
    ours_adamw=adamw,
    tolerance=1e-4,
    start=None,
    weights=weights_by_our_name,
    **overrides,
):
    """From a folder that peft made: the same losses and the same weights after 20 steps, then both open the other's.

    `start(ours, theirs)` puts the method into our model where a folder does not hold all that is trained.
    """
    reference, ours = make_pair(tmp_path / "base", **overrides)
    theirs = get_peft_model(copy.deepcopy(reference), config)
    theirs.save_pretrained(tmp_path / "start")
    names = start(ours, theirs) if start else load_adapter(ours, tmp_path / "start", method=method)
    frozen = {name: p.clone() for name, p in ours.named_parameters() if not p.requires_grad}
    assert names and (logits(ours) - logits(theirs)).abs().max() < 1e-5
    theirs_optimizer, ours_optimizer = theirs_adamw(theirs, lr), ours_adamw(ours, lr)
    assert sum(p.numel() for p in trained(ours).values()) == sum(p.numel() for p in trained(theirs).values())
    expected, got = train(theirs, theirs_optimizer), train(ours, ours_optimizer)
    deviation = max(abs(a - b) for a, b in zip(expected, got, strict=True))
    assert deviation < tolerance
    assert got[-1] < got[0] - 0.1

    save_adapter(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    theirs.save_pretrained(tmp_path / "theirs")
    after = weights(theirs)
    of_weights = max((after[name].flatten() - p.flatten()).abs().max().item() for name, p in trained(ours).items())
    assert of_weights < tolerance, of_weights
    for name, p in frozen.items():
        assert torch.equal(p, ours.get_parameter(name)), name

    assert_opens_both_ways(tmp_path, reference, ours, theirs)
    return ours, theirs


def assert_opens_both_ways(tmp_path, reference, ours, theirs):
    """peft opens tmp_path/ours, we open tmp_path/theirs: logits within 1e-5."""
    opened = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours")
    assert (logits(opened) - logits(ours)).abs().max() < 1e-5
    fresh = load(tmp_path / "base")
    load_adapter(fresh, tmp_path / "theirs")
    assert (logits(fresh) - logits(theirs)).abs().max() < 1e-5
