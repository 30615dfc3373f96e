"""What became of the rows of a data file, counted while it is read and said before the first step."""

from dataclasses import dataclass


@dataclass
class DatasetReport:
    """What became of the rows of a file. Nothing is cut or dropped without being counted here."""

    path: str
    seq_len: int | None
    rows: int = 0
    """Rows read."""
    examples: int = 0
    """Examples kept: rows, or with `split_long` their pieces."""
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    """Tokens of the longest example."""
    cut: int = 0
    """Rows cut at seq_len."""
    split: int = 0
    """Rows split into pieces of seq_len."""
    without_target: int = 0
    """Rows dropped: nothing in them is trained."""
    without_target_after_cut: int = 0
    """Rows dropped: all that is trained in them lay behind the cut."""
    special_content: int = 0
    """Rows whose own text holds a special token."""
    special_example: str | None = None
    chat_rows: int = 0
    """Rows that went through the chat template."""
    unended: int = 0
    """Chat rows with a trained message that no end-of-turn token follows."""
    images: int = 0
    """Images of the examples kept."""
    tiles: int = 0
    """Tiles that these become; one each, unless the model wants large images cut."""
    tile_tokens: int = 0
    """<image> tokens that each of them takes."""
    images_too_long: int = 0
    """Rows dropped: their images end behind seq_len."""
    bad_images: int = 0
    """Rows dropped: an image file that is missing or broken (with `skip_bad_rows`)."""
    bad_image_example: str | None = None
    virtual_tokens: int = 0
    """Placeholders in front of every example, counted as its tokens."""

    def lines(self) -> list[str]:
        """One sentence for the sum, and one for each thing a user should know."""
        lines = [
            f"{self.path}: {self.examples:,} examples from {_rows(self.rows)}, {self.tokens:,} tokens, of which "
            f"{self.target_tokens:,} are trained; the longest has {self.longest:,}"
        ]
        if self.virtual_tokens:
            lines.append(f"{self.virtual_tokens} virtual tokens in front of each of them, which --seq-len counts, too")
        if self.images:
            in_tiles = "" if self.tiles == self.images else f"in {self.tiles:,} tiles "
            lines.append(f"{self.images:,} images {in_tiles}of {self.tile_tokens} tokens each among them")
        if self.bad_images:
            lines.append(f"{_rows(self.bad_images)} dropped: bad images, as in {self.bad_image_example}")
        if self.images_too_long:
            lines.append(
                f"{_rows(self.images_too_long)} dropped: the images do not fit into --seq-len {self.seq_len} "
                "(images are never cut)"
            )
        if self.cut:
            lines.append(f"{_rows(self.cut)} cut to --seq-len {self.seq_len}")
        if self.split:
            lines.append(f"{_rows(self.split)} split into pieces of --seq-len {self.seq_len}")
        if self.without_target_after_cut:
            lines.append(
                f"{_rows(self.without_target_after_cut)} dropped: --seq-len {self.seq_len} cut off all that is trained"
            )
        if self.without_target:
            lines.append(f"{_rows(self.without_target)} dropped: nothing in them is trained")
        if self.special_content:
            lines.append(
                f"{_rows(self.special_content)} with special tokens such as {self.special_example!r} in their own "
                "text, which the model reads as such (--on-special-content error refuses them)"
            )
        if self.unended:
            lines.append(
                f"{_rows(self.unended)} with an answer that no end-of-turn token follows: from these the model does "
                "not learn to stop (does the tokenizer have this chat format's end-of-turn token? see --chat-format)"
            )
        return lines


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
