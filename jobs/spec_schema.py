"""The JSON Schema of a spec, for editors: `# yaml-language-server: $schema=...` at the head of a YAML file.

`python -m jobs.spec_schema` writes the committed copy; a test keeps it current.
"""

from __future__ import annotations

import json
from pathlib import Path

from jobs.spec import JobSpec

SCHEMA_FILE = Path(__file__).parent / "schema" / "job-spec.schema.json"


def schema_text() -> str:
    """The schema as it is committed: sorted keys, one trailing newline."""
    schema = JobSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Longtake job spec"
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.parent.mkdir(exist_ok=True)
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
