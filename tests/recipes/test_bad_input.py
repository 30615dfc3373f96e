"""What goes wrong at the user's end: one clear message, exit status 2, no traceback, nothing lost."""

import shutil

import pytest

from tests.tiny import make_checkpoint, run_recipe, sums, write_rows


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_checkpoint(folder / "base")
    write_rows(folder / "rows.jsonl", sums(6))
    return folder


# A file of the checkpoint or of the data, what happens to it (None: it is gone), and the words of the error.
FILES = {
    "truncated shard": ("model.safetensors", lambda old: old[:-1000], ["model.safetensors", "truncated"]),
    "no tokenizer": ("tokenizer.json", None, ["tokenizer"]),
    "no weights": ("model.safetensors", None, ["model.safetensors"]),
    "no config": ("config.json", None, ["config.json"]),
    "wrong architecture": (
        "config.json",
        lambda old: old.replace(b"Llama", b"Mistral").replace(b"llama", b"mistral"),
        ["MistralForCausalLM", "LlamaForCausalLM"],
    ),
    "other shape": (
        "config.json",
        lambda old: old.replace(b'"intermediate_size": 64', b'"intermediate_size": 128'),
        ["model.layers.1.mlp.down_proj.weight", "(32, 64)"],
    ),
    "more layers": (
        "config.json",
        lambda old: old.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'),
        ["missing", "model.layers.2.self_attn.q_proj.weight"],
    ),
    "missing file": ("rows.jsonl", None, ["rows.jsonl"]),
    "empty file": ("rows.jsonl", lambda old: b"", ["rows.jsonl", "empty"]),
    "malformed row": (
        "rows.jsonl",
        lambda old: old + b'{"prompt": \n',
        ["rows.jsonl:7:"],
    ),
    "unknown keys": ("rows.jsonl", lambda old: b'{"question": "a", "answer": "b"}\n', ["rows.jsonl:1:", "question"]),
}
FLAGS = {
    "unknown flag": (["--learning-rate", "1"], ["learning-rate"]),
    "seq-len": (["--seq-len", "9000"], ["9000", "512"]),
    "target": (["--targets", "q_prj"], ["q_prj", "q_proj"]),
    "model": (["--model", "no/such/folder"], ["no/such/folder"]),
}


def assert_one_clear_error(done, words, output):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr + done.stdout, done.stderr
    assert not (output / "adapter").exists() and not list(output.glob("checkpoints/*"))


@pytest.mark.parametrize("name", FILES)
def test_bad_files(good, tmp_path, name):
    file, change, words = FILES[name]
    shutil.copytree(good, tmp_path / "good")
    (path,) = (tmp_path / "good").rglob(file)
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    files = ("--model", tmp_path / "good/base", "--data", tmp_path / "good/rows.jsonl", "--output", tmp_path / "run")
    assert_one_clear_error(run_recipe("lora_finetune", *files, check=False), words, tmp_path / "run")


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(good, tmp_path, name):
    flags, words = FLAGS[name]
    done = run_recipe(
        "lora_finetune",
        *("--model", good / "base", "--data", good / "rows.jsonl", "--output", tmp_path / "run", *flags),
        check=False,
    )
    assert_one_clear_error(done, words, tmp_path / "run")


# Flags that cannot work, by recipe: known without reading a file.
AT_ONCE = {
    "lora_finetune": {
        "--activations-host-gib 2 --fused": "--activations-host-gib needs --activations offload",
        "--activations offload --activations-host-gib 2 --no-fused": "needs --activations offload and fused",
        "--activations offload --activations-host-gib 2 --fused --dropout 0.1": "needs --activations offload and fused",
        "--weights stream --activations fast --fused --dropout 0.1": "choose --activations lean or offload",
        "--max-grad-norm nan": "--max-grad-norm nan must not be negative",
        "--batch-size 0": "--batch-size 0 must be at least 1",
        "--grad-accum 0": "--grad-accum 0 must be at least 1",
        "--epochs 0": "--epochs 0 must be at least 1",
        "--max-steps -1": "--max-steps -1 must not be negative",
        "--seq-len 1": "--seq-len 1 leaves no token to predict",
        "--keep-last 0": "--keep-last 0 leaves nothing to resume from",
        "--save-every -1": "--save-every -1 must not be negative",
        "--warmup-steps -3": "--warmup-steps -3 must not be negative",
        "--weight-decay -0.1": "--weight-decay -0.1 must not be negative",
        "--max-grad-norm -1": "--max-grad-norm -1.0 must not be negative",
        "--lr 0": "--lr 0.0 must be a positive number",
        "--rank 0": "--rank 0 must be at least 1",
        "--alpha 0": "--alpha 0.0 must be a positive number",
        "--dropout 1": "--dropout 1.0 must lie in [0, 1)",
        "--activations-every 0": "--activations-every 0 must be at least 1",
        "--activations-gib -1": "--activations-gib -1.0 must not be negative",
        "--quantize-head": "it needs --quantize nf4",
        "--chat-format klingon": "--chat-format 'klingon' is neither a file nor",
        "--device cuda:7": "--device cuda:7 is not available here",
        "--eval-data missing.jsonl": "missing.jsonl: No such file",
        "--step-in-backward": "use --max-grad-norm 0",
        "--step-in-backward --max-grad-norm 0 --grad-accum 2": "so --grad-accum 2 has nothing to add up",
        "--step-in-backward --max-grad-norm 0 --dtype float16": "instead of float16",
        "--weights stream --activations fast --no-fused": "choose --activations lean or offload",
        "--weights stream --activations-every 2 --no-fused": "choose --activations lean or offload",
    },
    "peft_finetune": {
        "--method loftq": "it needs --quantize nf4",
        "--method pissa --weights stream": "it needs --weights resident",
        "--method p-tuning --encoder-size -3": "--encoder-size -3 must be at least 1",
        "--method p-tuning --prompt-encoder lstm --dropout 7": "--dropout 7.0 must lie in [0, 1)",
        "--method prefix --prompt-encoder mlp --encoder-size 0": "--encoder-size 0 must be at least 1",
        "--method dora --weights disk": "it needs --weights resident",
        "--method eva --rank-pattern q_proj=4": "--method eva divides the ranks itself",
        "--rank-pattern q_proj": "--rank-pattern q_proj is not NAME=NUMBER",
        "--alpha-pattern q_proj=0": "--alpha-pattern q_proj=0 is not NAME=NUMBER",
        "--method prompt --num-virtual-tokens 0": "--num-virtual-tokens 0 must be at least 1",
        "--method prompt --prompt-init text": "it needs --prompt-text",
        "--method prefix --prompt-text hello": "--prompt-text is read with --prompt-init text",
        "--method prefix --prompt-encoder lstm": "of prefix tuning it is mlp",
        "--method prompt --new-tokens <a>": "--new-tokens does not go with --method prompt",
        "--method prefix --modules-to-save norm": "--modules-to-save does not go with --method prefix",
        "--modules-to-save norm --dtype float16": "modules to save: float16 cannot",
        "--method houlsby --rank 0": "--rank 0 must be at least 1",
        "--method prompt --seq-len 21": "--seq-len 21 leaves no room behind 20 virtual tokens",
        "--new-tokens <a> <a>": "--new-tokens '<a>': a token is given once",
    },
    "full_finetune": {
        "--freeze-layers -1": "--freeze-layers -1 must not be negative",
        "--trainable [": "--trainable '[' is not a regular expression",
        "--weights stream": "streamed weights are frozen",
        "--weights stream --trainable norm --activations fast": "choose --activations lean or offload",
    },
    "vlm_finetune": {
        "--language frozen": "there is nothing to train",
        "--language full --dtype float16": "float16 cannot hold an Adam step",
        "--language full --embedding host": "not with --language full",
        "--language full --quantize nf4 --quantize-head": "quantised weights are frozen",
        "--language-lr nan": "--language-lr nan must be a positive number",
        "--vision lora --vision-lr -1": "--vision-lr -1.0 must be a positive number",
        "--lr 0 --vision lora --vision-lr 1e-3": "--lr 0.0 must be a positive number",
        "--language full --weights stream": "not with --language full",
        "--quantize-head": "needs --quantize nf4",
        "--image-workers -1": "--image-workers -1 is negative",
    },
    "vlm_pretrain_projector": {"--dtype float16": "float16 cannot hold an Adam step"},
    "pretrain": {"--seq-len 0": "--seq-len 0 leaves no token to predict"},
}
# Flags that do nothing because of another one.
IGNORED = {
    "lora_finetune": {
        "--eval-every 5": "--eval-every 5 has no effect without --eval-data",
        "--activations fast --activations-gib 2": "--activations-gib 2.0 has no effect with --activations fast",
        "--activations none --activations-every 2": "--activations-every 2 has no effect with --activations none",
    },
    "peft_finetune": {
        "--method prompt --rank 8": "--rank 8 has no effect with --method prompt",
        "--num-virtual-tokens 8": "--num-virtual-tokens 8 has no effect with --method lora",
        "--method vera --alpha 8": "--alpha 8.0 has no effect with --method vera",
        "--method ia3 --dropout 0.1": "--dropout 0.1 has no effect with --method ia3",
        "--method prefix --targets q_proj v_proj": "--targets q_proj v_proj has no effect with --method prefix",
        "--prompt-text hello": "--prompt-text hello has no effect with --method lora",
        "--method p-tuning --prompt-text hello": "--prompt-text hello has no effect with --method p-tuning",
        "--method p-tuning --dropout 0.1": "--dropout 0.1 has no effect with --method p-tuning unless --prompt-encoder",
        "--method prompt --prompt-encoder mlp": "--prompt-encoder mlp has no effect with --method prompt",
        "--method prefix --encoder-size 9": "--encoder-size 9 has no effect with --method prefix unless",
        "--method prefix --prompt-encoder mlp --prompt-init random": "--prompt-init random has no effect with --method",
        "--method ln --weight-decay 0.1": "--weight-decay 0.1 has no effect with --method ln",
    },
    "full_finetune": {"--eval-every 5": "--eval-every 5 has no effect without --eval-data"},
    "vlm_finetune": {
        "--vision-lr 1e-4": "--vision-lr 0.0001 has no effect with --vision frozen",
        "--vision lora --language frozen --targets q_proj": "--targets q_proj has no effect with --language frozen",
        "--language full --rank 8": "--rank 8 has no effect unless one of --vision, --projector, --language is lora",
        "--vision full --language full --quantize nf4": "--quantize nf4 has no effect with --vision full and",
    },
    "vlm_pretrain_projector": {"--activations fast --activations-gib 1": "has no effect with --activations fast"},
    "pretrain": {"--activations fast --activations-every 2": "has no effect with --activations fast"},
}


def without_a_model(folder, recipe, flags):
    """No model is there, and the data make no sense."""
    (folder / "rows.jsonl").write_text("no rows")
    files = ("--model", "no/such/folder", "--data", folder / "rows.jsonl", "--output", folder / "run")
    return run_recipe(recipe, *files, *flags.split(" "), check=False)


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [(recipe, *case) for recipe, cases in AT_ONCE.items() for case in cases.items()],
)
def test_flags_are_refused_before_anything_is_read(tmp_path, recipe, flags, words):
    """And the output folder is not even made."""
    done = without_a_model(tmp_path, recipe, flags)
    assert_one_clear_error(done, [words], tmp_path / "run")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [(recipe, *case) for recipe, cases in IGNORED.items() for case in cases.items()],
)
def test_flags_without_effect_are_named(tmp_path, recipe, flags, words):
    done = without_a_model(tmp_path, recipe, flags)
    note = done.stderr.splitlines()[0]
    assert note.startswith("note: --") and words in note and "no/such/folder" in done.stderr  # and it goes on


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("lora_finetune", "--eval-data rows.jsonl --eval-every 5"),
        ("lora_finetune", "--activations offload --activations-host-gib 2 --activations-gib 1 --fused"),
        ("peft_finetune", "--method p-tuning --prompt-encoder lstm --dropout 0.1 --encoder-size 8"),
        ("peft_finetune", "--method prompt --num-virtual-tokens 8 --weight-decay 0.1"),
        ("peft_finetune", "--method lora --num-virtual-tokens 20"),  # what happens where it is read
        ("peft_finetune", "--method ln --weight-decay 0.1 --new-tokens <a>"),
        ("vlm_finetune", "--vision lora --vision-lr 1e-4 --language full --rank 8"),
    ],
)
def test_flags_that_count_are_not_named(tmp_path, monkeypatch, recipe, flags):
    monkeypatch.chdir(tmp_path)
    done = without_a_model(tmp_path, recipe, flags)
    assert "no/such/folder" in done.stderr and "note: " not in done.stderr


def test_a_full_output_folder_of_another_run_is_refused(good, tmp_path):
    arguments = ["--model", good / "base", "--data", good / "rows.jsonl", "--output", tmp_path / "run"]
    run_recipe("lora_finetune", *arguments, "--max-steps", "1")
    saved = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    done = run_recipe("lora_finetune", *arguments, "--max-steps", "1", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--resume" in done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == saved
