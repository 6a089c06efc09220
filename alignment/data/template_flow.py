"""Whether a chat template puts the contents of turns into its text and looks at nothing else of them.

If so, everything else that it renders depends on the roles of the turns alone. The text around the contents is then
equal for all conversations with the same roles, and is rendered once (alignment/data/tokens/skeletons.py).

The syntax tree is followed with four sorts of values. A construct that is not known to be harmless counts as harmful.
Turns are taken to have one of three roles, a content that is a text and not blank, and no other field.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

from jinja2 import nodes

from alignment.core.errors import DataError
from alignment.data.template_syntax import tree_of


class _Sort(Enum):
    """What an expression is: the list of turns, a turn, a text with contents in it, or nothing of these."""

    turns = "turns"
    turn = "turn"
    content = "content"
    other = "other"


class _LooksInsideError(Exception):
    """The template may do something else with a content than to write it."""


_STRIPS = frozenset({"strip", "lstrip", "rstrip"})
_OF_TURNS = {"first": _Sort.turn, "last": _Sort.turn, "list": _Sort.turns, "length": _Sort.other, "count": _Sort.other}
"""Filters of the list of turns, and what they give."""
_CHOICES = frozenset({"selectattr", "rejectattr"})
"""Filters that choose turns by a field."""
_ABOUT_TYPES = frozenset({"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number"})
"""Tests whose outcome is equal for all texts."""
_FUNCTIONS = frozenset({"raise_exception", "namespace", "range"})
_FIELDS = frozenset({"role", "content"})
ROLES = frozenset({"system", "user", "assistant"})
"""Roles of turns that only have a content. Templates often write results of tools as JSON."""


@functools.lru_cache(maxsize=64)
def only_writes_contents(template: str) -> bool:
    """Whether the contents of turns are only written, perhaps without the blanks around them.

    False also for a template that reads the clock, and for one that is not valid Jinja.
    """
    try:
        tree = tree_of(template)
        flow = _Flow()
        before = None
        while before != flow.names:  # a name may be used above the line that sets it, in a loop
            before = dict(flow.names)
            flow.follow(tree.body)
    except (DataError, _LooksInsideError):
        return False
    return True


class _Flow:
    """Follows the statements of a template. ``names`` holds the sorts of variables, ``space.name`` in a namespace."""

    def __init__(self) -> None:
        self.names: dict[str, _Sort] = {"messages": _Sort.turns}

    # ---- statements

    def follow(self, statements: Iterable[nodes.Node]) -> None:
        """Raises ``_LooksInsideError`` for a statement that may look inside a content."""
        for statement in statements:
            if isinstance(statement, nodes.Output):
                for expression in statement.nodes:
                    self._require(expression, _Sort.other, _Sort.content)
            elif isinstance(statement, nodes.If):
                self._follow_if(statement)
            elif isinstance(statement, nodes.For):
                self._follow_for(statement)
            elif isinstance(statement, nodes.Assign):
                self._assign(statement.target, self._sort(statement.node))
            elif not isinstance(statement, nodes.Break | nodes.Continue):
                raise _LooksInsideError

    def _follow_if(self, statement: nodes.If) -> None:
        known = self._known(statement.test)
        self._truth(statement.test)
        if known is not False:
            self.follow(statement.body)
        if known is not True:
            self.follow(statement.elif_)
            self.follow(statement.else_)

    def _follow_for(self, statement: nodes.For) -> None:
        sort = self._sort(statement.iter)
        if sort not in (_Sort.turns, _Sort.other) or statement.recursive:
            raise _LooksInsideError
        self._assign(statement.target, _Sort.turn if sort is _Sort.turns else _Sort.other)
        if statement.test is not None:
            self._truth(statement.test)
        self.follow(statement.body)
        self.follow(statement.else_)

    def _assign(self, target: nodes.Node, sort: _Sort) -> None:
        if isinstance(target, nodes.Name):
            name = target.name
        elif isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        elif isinstance(target, nodes.Tuple) and sort is _Sort.other:
            for item in target.items:
                self._assign(item, sort)
            return
        else:
            raise _LooksInsideError
        self.names[name] = _either(self.names.get(name, sort), sort)

    # ---- expressions

    def _require(self, expression: nodes.Node, *allowed: _Sort) -> _Sort:
        sort = self._sort(expression)
        if sort not in allowed:
            raise _LooksInsideError
        return sort

    def _plain(self, *expressions: nodes.Node | None) -> None:
        for expression in expressions:
            if expression is not None:
                self._require(expression, _Sort.other)

    def _known(self, test: nodes.Node) -> bool | None:
        """The outcome of a test that all conversations share, whatever their roles; None for every other test."""
        if isinstance(test, nodes.Not):
            inner = self._known(test.node)
            return None if inner is None else not inner
        if isinstance(test, nodes.And | nodes.Or):
            deciding = isinstance(test, nodes.Or)
            return deciding if deciding in (self._known(test.left), self._known(test.right)) else None
        if isinstance(test, nodes.Test) and test.name == "string" and not isinstance(test.node, nodes.Name):
            return True if self._sort(test.node) is _Sort.content else None  # a variable may hold something else too
        asked_about = test.node if isinstance(test, nodes.Test) and test.name == "defined" else test
        return False if self._is_absent(asked_about) else None

    def _is_absent(self, expression: nodes.Node) -> bool:
        """Whether it is a field that no turn has, asks for one, or for a role that none has: ``turn.tool_calls``,
        ``'tool_calls' in turn``, ``turn.role == 'tool'``."""
        if isinstance(expression, nodes.Getattr | nodes.Getitem):
            return _field(expression) not in (None, *_FIELDS) and self._sort(expression.node) is _Sort.turn
        if not isinstance(expression, nodes.Compare) or len(expression.ops) > 1:
            return False
        (operand,) = expression.ops
        if operand.op == "in" and isinstance(expression.expr, nodes.Const):
            return expression.expr.value not in _FIELDS and self._sort(operand.expr) is _Sort.turn
        if operand.op == "eq" and isinstance(operand.expr, nodes.Const) and self._is_role(expression.expr):
            return operand.expr.value not in ROLES
        return False

    def _is_role(self, expression: nodes.Expr) -> bool:
        if not isinstance(expression, nodes.Getattr | nodes.Getitem):
            return False
        return _field(expression) == "role" and self._sort(expression.node) is _Sort.turn

    def _truth(self, expression: nodes.Node) -> None:
        """Accepts what has the same truth for every content: a text that is not blank is true."""
        if isinstance(expression, nodes.Not):
            self._truth(expression.node)
        elif isinstance(expression, nodes.And | nodes.Or):
            known = self._known(expression.left)
            self._truth(expression.left)
            if known is not isinstance(expression, nodes.Or):  # else the right side is never computed
                self._truth(expression.right)
        else:
            self._sort(expression)

    def _sort(self, expression: nodes.Node) -> _Sort:
        follow = _EXPRESSIONS.get(type(expression))
        if follow is None:
            raise _LooksInsideError
        return follow(self, expression)

    def _constant(self, _: nodes.Expr) -> _Sort:
        return _Sort.other

    def _name(self, expression: nodes.Name) -> _Sort:
        if any(name.startswith(f"{expression.name}.") for name in self.names if self.names[name] is not _Sort.other):
            raise _LooksInsideError  # a whole namespace with a content in it
        return self.names.get(expression.name, _Sort.other)

    def _item(self, expression: nodes.Getattr | nodes.Getitem) -> _Sort:
        if isinstance(expression.node, nodes.Name) and isinstance(expression, nodes.Getattr):
            sort = self.names.get(f"{expression.node.name}.{expression.attr}")
            if sort is not None:
                return sort
        inner, field = self._sort(expression.node), _field(expression)
        if inner is _Sort.turn and field is not None:
            return _Sort.content if field == "content" else _Sort.other
        if inner is _Sort.turns and isinstance(expression, nodes.Getitem) and field is None:
            if isinstance(expression.arg, nodes.Slice):
                self._plain(expression.arg.start, expression.arg.stop, expression.arg.step)
                return _Sort.turns
            self._plain(expression.arg)
            return _Sort.turn
        if inner is not _Sort.other:
            raise _LooksInsideError
        if field in ("previtem", "nextitem"):  # of a loop over turns or over something else
            raise _LooksInsideError
        if isinstance(expression, nodes.Getitem) and not isinstance(expression.arg, nodes.Slice):
            self._plain(expression.arg)
        return _Sort.other

    def _filter(self, expression: nodes.Filter) -> _Sort:
        self._plain(*_arguments(expression))
        if expression.node is None:
            raise _LooksInsideError
        sort = self._sort(expression.node)
        if sort is _Sort.content and expression.name == "trim" and not _arguments(expression):
            return sort
        if sort is _Sort.turns and expression.name in _OF_TURNS:
            return _OF_TURNS[expression.name]
        if sort is _Sort.turns and expression.name in _CHOICES and _is_plain_field(expression.args[:1]):
            return sort
        if sort is not _Sort.other or expression.name == "random":
            raise _LooksInsideError
        return sort

    def _test(self, expression: nodes.Test) -> _Sort:
        self._plain(*_arguments(expression))
        if self._sort(expression.node) is not _Sort.other and expression.name not in _ABOUT_TYPES:
            raise _LooksInsideError
        return _Sort.other

    def _call(self, expression: nodes.Call) -> _Sort:
        self._plain(*_arguments(expression))
        called = expression.node
        if isinstance(called, nodes.Name) and called.name in _FUNCTIONS:
            return _Sort.other
        if not isinstance(called, nodes.Getattr):
            raise _LooksInsideError
        sort = self._sort(called.node)
        if sort is _Sort.content and called.attr in _STRIPS and not _arguments(expression):
            return sort
        if sort is _Sort.turn and called.attr == "get" and len(_arguments(expression)) == 1:
            (name,) = expression.args
            return self._item(nodes.Getitem(called.node, name, "load"))
        if sort is not _Sort.other:
            raise _LooksInsideError
        return sort

    def _joined(self, expression: nodes.Add | nodes.Concat) -> _Sort:
        parts = expression.nodes if isinstance(expression, nodes.Concat) else [expression.left, expression.right]
        sorts = [self._require(part, _Sort.other, _Sort.content) for part in parts]
        return functools.reduce(_either, sorts)

    def _compared(self, expression: nodes.Compare) -> _Sort:
        (operand, *more) = expression.ops
        has_field = operand.op in ("in", "notin") and isinstance(expression.expr, nodes.Const)
        if has_field and not more and self._sort(operand.expr) is _Sort.turn:
            return _Sort.other
        self._plain(expression.expr, *(operand.expr for operand in expression.ops))
        return _Sort.other

    def _and(self, expression: nodes.And) -> _Sort:
        if self._known(expression.left) is False:
            return _Sort.other
        self._truth(expression.left)
        left, right = self._sort(expression.left), self._sort(expression.right)
        return right if left is not _Sort.other else _either(left, right)

    def _or(self, expression: nodes.Or) -> _Sort:
        return _either(self._sort(expression.left), self._sort(expression.right))

    def _not(self, expression: nodes.Not) -> _Sort:
        self._truth(expression.node)
        return _Sort.other

    def _chosen(self, expression: nodes.CondExpr) -> _Sort:
        self._truth(expression.test)
        known = self._known(expression.test)
        first = _Sort.other if known is False else self._sort(expression.expr1)
        last = _Sort.other if known is True or expression.expr2 is None else self._sort(expression.expr2)
        return last if known is False else first if known is True else _either(first, last)

    def _of_others(self, expression: nodes.Node) -> _Sort:
        self._plain(*expression.iter_child_nodes())
        return _Sort.other


_ARITHMETIC = (nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos)
_EXPRESSIONS: dict[type[nodes.Node], Callable[[_Flow, Any], _Sort]] = {
    **dict.fromkeys((nodes.Const, nodes.TemplateData), _Flow._constant),
    **dict.fromkeys((nodes.Getattr, nodes.Getitem), _Flow._item),
    **dict.fromkeys((nodes.Add, nodes.Concat), _Flow._joined),
    **dict.fromkeys((nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, *_ARITHMETIC), _Flow._of_others),
    nodes.Name: _Flow._name,
    nodes.Filter: _Flow._filter,
    nodes.Test: _Flow._test,
    nodes.Call: _Flow._call,
    nodes.Compare: _Flow._compared,
    nodes.And: _Flow._and,
    nodes.Or: _Flow._or,
    nodes.Not: _Flow._not,
    nodes.CondExpr: _Flow._chosen,
}


def _field(expression: nodes.Getattr | nodes.Getitem) -> str | None:
    """The name of the field, or None for an index or a name that is computed."""
    if isinstance(expression, nodes.Getattr):
        return expression.attr
    return expression.arg.value if isinstance(expression.arg, nodes.Const) and _is_text(expression.arg) else None


def _is_text(constant: nodes.Const) -> bool:
    return isinstance(constant.value, str)


def _is_plain_field(names: Sequence[nodes.Expr]) -> bool:
    """Whether this is the name of a field other than the content, and not a path that may lead to it."""
    values = [name.value if isinstance(name, nodes.Const) else None for name in names]
    return len(values) == 1 and isinstance(values[0], str) and values[0].isidentifier() and values[0] != "content"


def _arguments(expression: nodes.Filter | nodes.Test | nodes.Call) -> list[nodes.Expr]:
    named = [argument.value for argument in expression.kwargs]
    packed = [argument for argument in (expression.dyn_args, expression.dyn_kwargs) if argument is not None]
    return [*expression.args, *named, *packed]


def _either(first: _Sort, second: _Sort) -> _Sort:
    """The sort of a value that is one or the other.

    Raises:
        _LooksInsideError: one is a turn or all turns, and the other is not.
    """
    if first is second:
        return first
    if {first, second} == {_Sort.content, _Sort.other}:
        return _Sort.content
    raise _LooksInsideError
