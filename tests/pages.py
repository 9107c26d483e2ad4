"""HTML pages as a browser gets them, for tests of reports: what is on them, and what they would load."""

from __future__ import annotations

from html.parser import HTMLParser

# What text of users must never become.
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
_LOADING = {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
_VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Every element with its attributes, and the text; complains about tags that do not match.

    Attributes:
        elements: tags and attributes in order.
        open: tags that were opened and never closed.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self._texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._texts.append(data)

    @property
    def text(self) -> str:
        """All text, with single blanks."""
        return " ".join(" ".join(self._texts).split())

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    @property
    def loads(self) -> list[str]:
        """What would fetch or run something: tags and attributes by name."""
        found = [tag for tag, _ in self.elements if tag in _LOADING]
        names = [name for _, attributes in self.elements for name in attributes]
        return found + [n for n in names if n in {"src", "href"} or n.startswith("on")]
