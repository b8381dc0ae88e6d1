"""Files of the repository as pages of the site: CHANGELOG.md, CONTRIBUTING.md and the scripts of examples/.

A hook of mkdocs (`.ci/site.yml`). Pages of docs/ name these by their paths in the repository; here a name is a link.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
EXAMPLES = "examples.md"
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py") if path.parent.name != "paper"
)


def anchor(script: str) -> str:
    """Of a script on the page of examples."""
    return script.removesuffix(".py").replace("/", "-")


def examples() -> str:
    """The page of all scripts, in full."""
    parts = ["# Scripts of `examples/`\n\nAs they lie in the repository; the tests run them."]
    for script in SCRIPTS:
        code = (ROOT / script).read_text(encoding="utf-8").rstrip()
        parts.append(f"## {script} {{ #{anchor(script)} }}\n\n```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


def linked(text: str) -> str:
    """A page of docs/ with names of these files as links, in blocks of code as they are."""
    targets = {**PAGES, **{script: f"{EXAMPLES}#{anchor(script)}" for script in SCRIPTS}}
    parts = re.split(r"^(```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    for index in range(0, len(parts), 2):
        for path, target in targets.items():
            parts[index] = re.sub(rf"(?<!\[)`{re.escape(path)}`", f"[`{path}`]({target})", parts[index])
            parts[index] = parts[index].replace(f"](../{path})", f"]({target})")
    return "".join(parts)


# --- the hook ---------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """The pages are files of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, EXAMPLES, content=examples()))
    for path, name in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links in the place of names."""
    return markdown if page.file.src_uri == EXAMPLES else linked(markdown)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The page for what is not found: links from where it lies, as all pages do, not from a server's root."""
    if template_name != "404.html":
        return output_content
    return re.sub(r'((?:href|src)=")/(?!/)', r"\1", output_content).replace('"base": "/"', '"base": "."')
