"""Writes the generated pages of the reference: ``python -m book``."""

from __future__ import annotations

from book.reference import DOCS, pages, stale


def main() -> None:
    """Writes every page whose text would change, and removes those that nothing generates any more."""
    for name in stale():
        (DOCS / name).unlink()
        print(f"removed docs/{name}")
    for name, text in pages().items():
        page = DOCS / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
