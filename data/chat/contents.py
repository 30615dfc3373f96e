"""What a message says, as a chat template wants to have it: one string, or a list of parts with images among them.

Templates of text models put `message.content` into the text as it is; those of vision-language models go through a
list and pick out the images and the texts. Nothing in a checkpoint says which kind its template is, and the wrong kind
loses the text silently. So each template is tried out with a probe message.
"""

from collections.abc import Callable

PLACEHOLDER = "<image>"  # stands for an image in a text
IMAGE = {"type": "image"}
PROBE = "\ue000probe\ue001"  # private-use characters, which no template writes or changes

Content = str | list[dict] | None  # a list only where there are images in it


def takes_parts(render: Callable[[list[dict]], str]) -> bool:
    """Whether a template reads a list of parts; one that does not fails or prints the list itself."""
    found = _try(render, as_parts(PROBE))
    return PROBE in found and "'type'" not in found and '"type"' not in found


def takes_strings(render: Callable[[list[dict]], str]) -> bool:
    """Whether a template reads a string. One that refuses the probe for other reasons gets strings, too."""
    return PROBE in _try(render, PROBE) or PROBE not in _try(render, as_parts(PROBE))


def as_parts(content: Content) -> list[dict] | None:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_string(content: Content) -> str | None:
    """Each image as <image>, on a line of its own."""
    if not isinstance(content, list):
        return content
    text = ""
    for i, part in enumerate(content):
        if i and IMAGE in (part, content[i - 1]):
            text += "\n"
        text += PLACEHOLDER if part == IMAGE else part["text"]
    return text


def texts_of(content: Content) -> list[str]:
    """The words of a message, without its images."""
    return [part["text"] for part in as_parts(content) or () if part != IMAGE]


def _try(render: Callable[[list[dict]], str], content: Content) -> str:
    try:
        return render([{"role": "user", "content": content}])
    except ValueError:
        return ""
