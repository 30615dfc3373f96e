"""What became of the rows of a data file, counted while it is read and said before the first step."""

from dataclasses import dataclass


@dataclass
class DatasetReport:
    """Nothing is cut or dropped without being counted here."""

    path: str
    seq_len: int | None
    rows: int = 0  # rows read
    examples: int = 0  # examples kept: rows, or with `split_long` their pieces
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0  # tokens of the longest example
    cut: int = 0  # rows cut at seq_len
    split: int = 0  # rows split into pieces of seq_len
    without_target: int = 0  # rows dropped: nothing in them is trained
    without_target_after_cut: int = 0  # rows dropped: all that is trained in them lay behind the cut
    other_side: int = 0  # rows dropped: another side of them, such as the rejected answer, was
    special_content: int = 0  # rows whose own text holds a special token
    special_example: str | None = None
    chat_rows: int = 0  # rows that went through the chat template
    unended: int = 0  # chat rows with a trained message that no end-of-turn token follows
    images: int = 0  # images of the examples kept
    tiles: int = 0  # tiles that these become; one each, unless the model wants large images cut
    tile_tokens: int = 0  # <image> tokens that each of them takes
    images_too_long: int = 0  # rows dropped: their images end behind seq_len
    bad_images: int = 0  # rows dropped: an image file that is missing or broken (with `skip_bad_rows`)
    bad_image_example: str | None = None
    virtual_tokens: int = 0  # placeholders in front of every example, counted as its tokens

    def lines(self) -> list[str]:
        """One sentence for the sum, and one for each kind of row that a user should know of."""
        lines = [
            f"{self.path}: {self.examples:,} examples from {_rows(self.rows)}, {self.tokens:,} tokens, of which "
            f"{self.target_tokens:,} are trained; the longest has {self.longest:,}"
        ]
        if self.virtual_tokens:
            lines.append(f"{self.virtual_tokens} virtual tokens in front of each of them, which --seq-len counts, too")
        if self.images:
            in_tiles = "" if self.tiles == self.images else f"in {self.tiles:,} tiles "
            lines.append(f"{self.images:,} images {in_tiles}of {self.tile_tokens} tokens each among them")
        seq_len = f"--seq-len {self.seq_len}"
        special = f"with special tokens such as {self.special_example!r} in their own text, read as special tokens"
        unended = "with an answer that no end-of-turn token follows: from these the model does not learn to stop"
        missing = "does the tokenizer have this chat format's end-of-turn token? see --chat-format"
        counted = [
            (self.bad_images, f"dropped: bad images, as in {self.bad_image_example}"),
            (self.images_too_long, f"dropped: the images do not fit into {seq_len} (images are never cut)"),
            (self.cut, f"cut to {seq_len}"),
            (self.split, f"split into pieces of {seq_len}"),
            (self.without_target_after_cut, f"dropped: {seq_len} cut off all that is trained"),
            (self.without_target, "dropped: nothing in them is trained"),
            (self.other_side, "dropped: another completion of the row was"),
            (
                self.special_content,
                f"{special} (--on-special-content error refuses them)",
            ),
            (self.unended, f"{unended} ({missing})"),
        ]
        return lines + [f"{_rows(count)} {what}" for count, what in counted if count]


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
