"""Tables as pandas DataFrames; pandas is imported when a table is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignment.core.errors import ConfigError

if TYPE_CHECKING:
    import pandas


def data_frame(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """A DataFrame with these columns in this order, also without rows; a row may lack a column.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError(
            "tables need pandas, which is not installed here", remedy="pip install 'alignment-pipeline[pandas]'"
        ) from None
    return pandas.DataFrame(list(rows), columns=list(columns))
