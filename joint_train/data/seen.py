"""What was seen in the records of a source: their formats, their columns, and what is worth knowing about them."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from joint_train.data.formats import OPTIONS, Adapted
from joint_train.data.notices import sentence

MOST_OPTIONS = 50
"""Values of options that are kept."""
MOST_COLUMNS = 200
"""Names of columns that are kept: rows of JSON may have any number."""


@dataclass
class Seen:
    """What was seen in some records.

    Attributes:
        formats: how many records are in each.
        used: columns that went into examples.
        columns: all columns there are.
        options: how many records give the chat template an option, by ``name=value``; text that the configuration gives
            stays out, because it is written to the cache and may be a secret of the environment.
        notices: for each kind of :mod:`joint_train.data.notices` how often, and where first.
    """

    formats: Counter[str] = field(default_factory=Counter)
    used: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)
    options: Counter[str] = field(default_factory=Counter)
    notices: dict[str, tuple[int, str]] = field(default_factory=dict)

    def count_record(self, adapted: Adapted) -> None:
        """Count a record."""
        self.formats[adapted.format] += 1
        self.count_notices(adapted.notices, adapted.where)
        self.used |= adapted.used
        for name, value in adapted.example.get(OPTIONS, {}).items():
            secret = isinstance(value, str) and name in adapted.configured  # it may be a variable of the environment
            shown = f"{name}=(as configured)" if secret else f"{name}={json.dumps(value, ensure_ascii=False)}"
            if shown in self.options or len(self.options) < MOST_OPTIONS:
                self.options[shown] += 1
        if len(self.columns) < MOST_COLUMNS:
            self.columns.update(map(str, adapted.columns))

    def count_notices(self, counts: Counter[str], where: str) -> None:
        """Count what is worth knowing about a record at ``where``."""
        for kind, count in counts.items():
            known, first = self.notices.get(kind, (0, where))
            self.notices[kind] = (known + count, first)

    def add(self, other: "Seen") -> None:
        """Take over what was seen in later records."""
        self.formats += other.formats
        self.used |= other.used
        self.columns |= other.columns
        self.options += other.options
        for kind, (count, where) in other.notices.items():
            self.count_notices(Counter({kind: count}), where)

    @property
    def unused(self) -> list[str]:
        """Columns that went into no example."""
        return sorted(self.columns - self.used)

    def summary(self) -> str:
        """What the records are, in a sentence."""
        counts = self.formats.most_common()
        rows = sum(self.formats.values())
        formats = (
            f"format {counts[0][0]}"
            if len(counts) == 1
            else f"formats {', '.join(f'{name} ({count:,})' for name, count in counts)}"
        )
        return (
            f"{rows:,} rows in the {formats}; columns used: {', '.join(sorted(self.used)) or 'none'}; "
            f"unused: {', '.join(self.unused) or 'none'}"
        )

    def sentences(self) -> list[tuple[str, str]]:
        """Kind and sentence of what is worth knowing."""
        return [(kind, f"{sentence(kind, count)} (first: {where})") for kind, (count, where) in self.notices.items()]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "formats": dict(self.formats),
            "used": sorted(self.used),
            "columns": sorted(self.columns),
            "options": dict(self.options),
            "notices": {kind: list(found) for kind, found in self.notices.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Seen":
        """What :meth:`as_json` gave."""
        notices = {kind: (count, where) for kind, (count, where) in data["notices"].items()}
        formats, options = Counter(data["formats"]), Counter(data["options"])
        return cls(formats, set(data["used"]), set(data["columns"]), options, notices)
