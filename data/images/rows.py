"""The images of a row: where their files are named, and where they stand in its text.

Two ways are common, and a row must choose one:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "…"}]}]}
    {"image": "a.png" or ["a.png", …], "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}

In the first, a part may also say {"type": "image", "image": …}, {"type": "image", "url": …} or
{"type": "image_url", "image_url": {"url": …}}. The second, LLaVA's, goes with every format of row ("images" is the same
as "image"); there "<image>", or a part {"type": "image"}, takes the next of the files. In a row without such a column
"<image>" is nothing but a special token in somebody's text.
"""

from data.chat.contents import IMAGE, PLACEHOLDER, Content
from data.json_rows import shown


class RowImages:
    """Collects a row's image files in the order in which they stand in its text."""

    def __init__(self, row: dict):
        columns = [key for key in ("image", "images") if row.get(key) is not None]
        if len(columns) > 1:
            raise ValueError("the row has both 'image' and 'images'; leave one")
        self.column: list[str] | None = None
        """The files that the row lists in a column of its own."""
        if columns:
            listed = row[columns[0]]
            listed = listed if isinstance(listed, list) else [listed]
            self.column = [_file(entry, f"{columns[0]}[{i}]") for i, entry in enumerate(listed)]
        self.of_parts: list[str] = []
        """The files that its messages name, so far."""

    @property
    def files(self) -> tuple[str, ...]:
        """In the order of their places; their number is checked once the whole text is known."""
        return tuple(self.of_parts if self.column is None else self.column)

    def string(self, text: str) -> Content:
        """A message's string as its content: its placeholders become parts."""
        if self.column is None or PLACEHOLDER not in text:
            return text
        parts: list[dict] = []
        pieces = text.split(PLACEHOLDER)
        for i, piece in enumerate(pieces):
            # The line break between image and words is the template's to write.
            piece = piece.lstrip("\n") if i else piece
            piece = piece.rstrip("\n") if i < len(pieces) - 1 else piece
            parts += ([IMAGE] if i else []) + ([{"type": "text", "text": piece}] if piece else [])
        return parts

    def part(self, part: dict, where: str) -> dict:
        """An image part of a message."""
        keys = [key for key in ("path", "image", "url", "image_url") if part.get(key) is not None]
        if not keys:
            if self.column is None:
                raise ValueError(f'{where} holds an image without a file; expected {{"type": "image", "path": …}}')
            return IMAGE
        if self.column is not None or len(keys) > 1:
            raise ValueError(f"{where} names the file of an image twice: {', '.join(keys)} and elsewhere in the row")
        self.of_parts.append(_file(part[keys[0]], f"{where}.content {keys[0]}"))
        return IMAGE


def _file(found: object, where: str) -> str:
    """A file's name in any of the spellings: "a.png", {"path": "a.png"}, {"url": "a.png"}."""
    if isinstance(found, dict):
        found = next((found[key] for key in ("path", "url") if found.get(key) is not None), found)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{where} must be the path of a file, got {shown(found)}")
    return found.removeprefix("file://")
