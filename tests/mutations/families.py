"""Faults with architectures that cache, window, mask or cap in ways of their own."""

from __future__ import annotations

from tests.mutations.mutation import in_file

FAMILIES = "unit/models/test_other_families.py"

MUTATIONS = [
    *in_file(
        "models/forward/flat.py",
        FAMILIES,
        (
            "a model's own mask is not noticed",
            "        and not has_own_mask(model)\n",
            "",
            "test_a_mask_that_depends_on_the_values_takes_the_padded_path",
        ),
    ),
]
