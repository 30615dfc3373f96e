"""Datasets and batches with images: what is kept, what is dropped and said, and where everything lies."""

import itertools
import json
import pickle

import pytest
import torch

from data.batches import Batches
from data.dataset import IGNORE_INDEX, load_dataset
from data.images.files import load_image
from tests.data.images.tiny_vision import TOKENS, draw, parts

TOKENIZER, _, PROCESSOR = parts()
TEMPLATE = parts("chatml")[1]
IMAGE = PROCESSOR.token_id


def row(question: str, *images: str, answer: str = "yes") -> dict:
    """LLaVA's form; the images stand before the question."""
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": list(images)} if images else {})


ROWS = [
    row("hello", "a.png"),
    row("a question without a picture", answer="an answer " * 3),
    row("two", "b.png", "c.png"),
    {"prompt": "hello", "completion": "world"},
    row("the same again", "a.png", answer="no"),
    row("x", "c.png", "b.png"),
]


@pytest.fixture
def load(tmp_path):
    """Writes rows and pictures, and loads them."""
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        draw(40 + 9 * seed, 30, seed=seed).save(tmp_path / name)

    def load(rows=ROWS, seq_len=None, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"image_processor": PROCESSOR} | options
        return load_dataset(tmp_path / "rows.jsonl", TOKENIZER, TEMPLATE, seq_len=seq_len, **options)

    return load


# Datasets


def test_examples_carry_their_images(load, tmp_path):
    dataset = load()
    images = dataset.images
    assert images.names == ["a.png", "b.png", "c.png", "a.png", "c.png", "b.png"]
    assert [list(images.of(i)) for i in range(6)] == [[0], [], [1, 2], [], [3], [4, 5]]
    assert images.lines == [1, 3, 3, 5, 6, 6]
    for i in range(6):
        assert (dataset[i][0] == IMAGE).sum() == TOKENS * len(images.of(i))
        assert not (dataset[i][1] == IMAGE).any()
    expected = torch.cat([load_image(tmp_path / name, PROCESSOR) for name in ("b.png", "c.png")])
    assert dataset.pixel_values(2).equal(expected) and dataset.pixel_values(1) is None
    assert dataset.report.lines()[1:] == ["6 images of 4 tokens each among them"]
    assert pickle.loads(pickle.dumps(dataset)).images == images


def test_text_rows_come_out_as_without_a_processor(load):
    rows = [ROWS[1], ROWS[3]]
    plain, dataset = load(rows, image_processor=None), load(rows)
    assert plain.images is None and plain.fingerprint == dataset.fingerprint
    assert plain.input_ids.equal(dataset.input_ids) and plain.report.lines() == dataset.report.lines()
    assert plain.pixel_values(0) is None


def test_image_root(load, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    draw().save(tmp_path / "elsewhere" / "d.png")
    assert load([row("x", "d.png")], image_root=tmp_path / "elsewhere").images.names == ["d.png"]
    with pytest.raises(ValueError, match="rows.jsonl:1: image a.png: there is no such file"):
        load(image_root=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: image ../a.png: '..' may lead out of .*--image-root"):
        load([row("x", "../a.png")], image_root=tmp_path / "elsewhere", skip_bad_rows=True)


def test_bad_images_are_an_error_or_skipped_and_counted(load, tmp_path):
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    rows = [ROWS[0], row("x", "missing.png"), ROWS[1], row("x", "a.png", "broken.png"), ROWS[4]]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: image missing.png: there is no such file .--skip-bad-rows"):
        load(rows)
    dataset = load(rows, skip_bad_rows=True)
    report = dataset.report
    assert (len(dataset), report.rows, report.bad_images, report.images) == (3, 5, 2, 2)
    assert dataset.images.names == ["a.png", "a.png"] and dataset.images.lines == [1, 5]
    assert report.lines()[2] == (
        f"2 rows dropped: bad images, as in {tmp_path}/rows.jsonl:2: image missing.png: there is no such file"
    )
    with pytest.raises(ValueError, match="no row is left to train on: 2 rows dropped: bad images"):
        load([rows[1], rows[3]], skip_bad_rows=True)


def test_placeholders_that_do_not_match_are_an_error_in_any_case(load):
    bad = row("<image> two", "a.png")
    with pytest.raises(ValueError, match="rows.jsonl:2: 1 image, but 2 <image> in the text to stand for them"):
        load([ROWS[0], bad], skip_bad_rows=True)


def test_seq_len_never_cuts_an_image(load):
    long = row("hello " * 8, "a.png", "b.png", answer="world " * 30)
    whole = load([long])
    length, ids = whole.lengths[0], whole.input_ids.tolist()
    images_end = length - ids[::-1].index(IMAGE)
    first_target = (whole.targets != IGNORE_INDEX).nonzero()[0].item()
    assert images_end < first_target < length
    for seq_len in range(load([ROWS[3]]).lengths[0], length + 2):
        dataset = load([ROWS[3], long], seq_len)
        report = dataset.report
        if seq_len < images_end:
            assert (len(dataset), report.images, report.images_too_long, report.cut) == (1, 0, 1, 0)
            assert f"1 row dropped: the images do not fit into --seq-len {seq_len}" in report.lines()[1]
        elif seq_len < first_target + 2:  # nothing trained is left
            assert (len(dataset), report.without_target_after_cut, report.images_too_long) == (1, 1, 0)
        else:
            assert dataset[1][0].tolist() == ids[:seq_len] and report.cut == (seq_len < length)
            assert (dataset[1][0] == IMAGE).sum() == 2 * TOKENS and report.images == 2
        assert dataset.images.offsets[-1] == len(dataset.images.names) == report.images
        assert len(dataset.images.offsets) == len(dataset) + 1


def test_rows_with_images_are_cut_where_texts_are_split(load):
    text = {"text": "hello world " * 30}
    dataset = load([text, row("hello", "a.png", answer="world " * 60)], seq_len=40, split_long=True, train_on="all")
    assert dataset.report.split == 1 and dataset.report.cut == 1 and dataset.report.images == 1
    assert dataset.images.offsets[-2:] == [0, 1] and len(dataset.images.offsets) == len(dataset) + 1
    assert (dataset[-1][0] == IMAGE).sum() == TOKENS


def test_fingerprint_depends_on_the_images(load, tmp_path):
    same = load().fingerprint
    assert same == load().fingerprint
    others = [load([row("hello", *names), *ROWS[1:]]).fingerprint for names in (("b.png",), ("a.png", "a.png"))]
    assert load([*ROWS[:2], row("two", "c.png", "b.png"), *ROWS[3:]]).fingerprint != same
    draw(90, 30).save(tmp_path / "a.png")
    assert load().fingerprint not in [same, *others]


# Batches


def test_padded_batches(load, tmp_path):
    dataset = load()
    first, second = Batches(dataset, batch_size=3, pad_id=9).one_epoch()
    assert first.images.pixel_values.shape == (3, 3, 28, 28) and first.images.pixel_values.dtype == torch.float32
    assert first.images.positions.shape == (2, 3 * TOKENS) and first.images.positions.dtype == torch.int64
    for batch, names in ((first, "abc"), (second, "acb")):
        expected = torch.cat([load_image(tmp_path / f"{name}.png", PROCESSOR) for name in names])
        assert batch.images.pixel_values.equal(expected)
        assert (batch.input_ids[tuple(batch.images.positions)] == IMAGE).all()
        assert (batch.input_ids == IMAGE).sum() == batch.images.positions.shape[1]
    # the last three rows: none in the first, so the images stand in rows 1 and 2
    assert second.images.positions[0].tolist() == [1] * TOKENS + [2] * 2 * TOKENS


def test_batches_without_images(load):
    dataset = load()
    assert Batches(dataset, batch_size=1).collate([[1], [3]], iter(())).images is None
    plain = load([ROWS[1], ROWS[3]], image_processor=None)
    for batch in Batches(plain, batch_size=2).one_epoch():
        assert batch.images is None


def test_packed_rows(load, tmp_path):
    dataset = load()
    capacity = max(sum(dataset.lengths) // 2, max(dataset.lengths) + 10)
    batches = Batches(dataset, batch_size=8, packing=True, seq_len=capacity)
    plan = batches.plan(0)[0]
    assert any(len(row) > 2 for row in plan) and len(plan) > 1
    (batch,) = batches.one_epoch()
    order = [i for row in plan for i in row]
    names = [dataset.images.names[number] for i in order for number in dataset.images.of(i)]
    expected = torch.cat([load_image(tmp_path / name, PROCESSOR) for name in names])
    assert batch.images.pixel_values.equal(expected)
    wanted = []  # image by image: where its tokens must lie
    for b, packed in enumerate(plan):
        start = 0
        for i in packed:
            wanted += [[b, start + at] for at in (dataset[i][0] == IMAGE).nonzero().flatten().tolist()]
            start += dataset.lengths[i]
    assert batch.images.positions.T.tolist() == wanted
    # No contamination: an image lies wholly within the document that its row became.
    documents = batch.layout.segments[tuple(batch.images.positions)].view(-1, TOKENS)
    assert (documents == documents[:, :1]).all()
    expected = [k for packed in plan for k, i in enumerate(packed) for _ in dataset.images.of(i)]
    assert documents[:, 0].tolist() == expected


def flat(steps):
    return [batch for _, _, batches in steps for batch in batches]


def same(a, b) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("input_ids", "targets", "target_index")]
    if a.images is None or b.images is None:
        return a.images is b.images and all(x.equal(y) for x, y in pairs)
    pairs += [(a.images.pixel_values, b.images.pixel_values), (a.images.positions, b.images.positions)]
    return all(x.equal(y) for x, y in pairs)


@pytest.mark.parametrize("packing", [False, True])
def test_workers_change_nothing(load, packing):
    dataset = load(ROWS * 4)

    def steps(workers, *position):
        options = {"packing": packing, "seq_len": 2 * max(dataset.lengths)}
        batches = Batches(dataset, batch_size=2, grad_accum=2, shuffle=True, image_workers=workers, **options)
        return list(itertools.islice(batches.steps(*position), 12))

    here = steps(0)
    assert here[-1][0] >= 1  # into the next epoch
    for workers in (1, 4):
        ahead = steps(workers)
        assert [step[:2] for step in ahead] == [step[:2] for step in here]
        assert all(same(a, b) for a, b in zip(flat(ahead), flat(here), strict=True))
    resumed = steps(3, *here[5][:2])
    assert [step[:2] for step in resumed[:7]] == [step[:2] for step in here[5:]]
    assert all(same(a, b) for a, b in zip(flat(resumed[:7]), flat(here[5:]), strict=True))


def test_to_a_device_and_dtype(load):
    batch = next(Batches(load(), batch_size=3).one_epoch()).to(torch.device("cpu"), torch.bfloat16)
    assert batch.images.pixel_values.dtype == torch.bfloat16 and batch.images.positions.dtype == torch.int64


def test_number_of_workers_is_checked(load):
    with pytest.raises(ValueError, match="--image-workers -1 is negative"):
        Batches(load(), batch_size=1, image_workers=-1)


def test_the_model_must_have_an_embedding_for_image_tokens(load):
    with pytest.raises(ValueError, match=f"contains token id {IMAGE}, but the model has {IMAGE} embeddings"):
        load().check_vocabulary(IMAGE)
