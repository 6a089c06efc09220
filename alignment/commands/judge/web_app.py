"""The page on which people judge, as a web application: a pair at a time, a form for each vote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from alignment.commands.judge.verb import Ballots, Choice, Refused, annotator_name
from alignment.commands.shared.page_server import assets, guarded
from alignment.core.errors import DataError
from alignment.report.kit.pages import environment
from alignment.report.kit.text import prose

MOST_BYTES = 4096
"""The longest form; one has a name, a hash and a digit."""


def application(ballots: Ballots, token: str, *, run: str, annotator: str | None) -> ASGIApp:
    """The application for one pair of arms; ``annotator`` is who judges unless somebody names another."""
    pages = _Pages(ballots, run=run, annotator=annotator)
    routes = [
        Route("/", pages.start),
        Route("/judge", pages.judge),
        Route("/vote", pages.vote, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        *assets("alignment.commands.judge", "judge.css", "keys.js"),
    ]
    return guarded(routes, token, command="align judge")


class _Pages:
    """What the addresses of the application answer."""

    def __init__(self, ballots: Ballots, *, run: str, annotator: str | None) -> None:
        self._ballots = ballots
        self._run = run
        self._annotator = annotator
        self._templates = environment("alignment.commands.judge")

    async def start(self, request: Request) -> Response:
        """Asks who judges, unless that is known; ``?who`` asks in any case."""
        if self._annotator is not None and "who" not in request.query_params:
            return _to_judge(self._annotator)
        return self._page("start.html.j2", judged=self._ballots.judged())

    async def judge(self, request: Request) -> Response:
        try:
            name = annotator_name(request.query_params.get("annotator", ""))
        except ValueError as error:
            return self._page("start.html.j2", status=400, problem=f"{error}.", judged=self._ballots.judged())
        standing = self._ballots.standing(name)
        if standing.pair is None:
            return self._page("done.html.j2", standing=standing)
        return self._page(
            "ballot.html.j2",
            standing=standing,
            turns=_turns(standing.pair.messages),
            answers=[prose(answer) for answer in standing.answers],
        )

    async def vote(self, request: Request) -> Response:
        def store(name: str, form: Mapping[str, str]) -> None:
            try:
                choice = Choice(form.get("choice", ""))
            except ValueError:
                raise ValueError("A vote is 1, 2 or 0.") from None
            self._ballots.vote(name, form.get("pair", ""), choice)

        return await self._changed(request, store)

    async def undo(self, request: Request) -> Response:
        return await self._changed(request, lambda name, _: self._ballots.undo(name))

    async def _changed(self, request: Request, change: Callable[[str, Mapping[str, str]], None]) -> Response:
        name = None
        try:
            form = await _form(request)
            name = annotator_name(form.get("annotator", ""))
            change(name, form)
        except Refused as refusal:
            return self._refused(name, str(refusal), status=refusal.status)
        except ValueError as error:
            return self._refused(name, str(error), status=400)
        except OSError as error:
            problem = f"The votes file cannot be written: {error.strerror}. Nothing else was changed."
            return self._refused(name, problem, status=507)
        except DataError as error:
            return self._refused(name, f"The votes file was changed by somebody else: {error}", status=500)
        return _to_judge(name)

    def _refused(self, name: str | None, problem: str, *, status: int) -> Response:
        return self._page("refused.html.j2", status=status, problem=prose(problem), annotator=name)

    def _page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        values = {"run": self._run, "problem": "", "total": self._ballots.total, **values}
        html = self._templates.get_template(template).render(link_to=_link_to, **values)
        return HTMLResponse(html, status_code=status)


async def _form(request: Request) -> Mapping[str, str]:
    """The fields of a form; of a field that is repeated, the last."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise ValueError("The form is too long.")
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=8))
    except ValueError:
        raise ValueError("The form has too many fields.") from None


def _link_to(annotator: str) -> str:
    return f"judge?{urlencode({'annotator': annotator})}"


def _to_judge(annotator: str) -> Response:
    return RedirectResponse(_link_to(annotator), status_code=303)


def _turns(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    turns = []
    for message in messages:
        calls = [json.dumps(call, ensure_ascii=False, indent=1) for call in message.get("tool_calls") or []]
        text = "\n".join([*filter(None, [str(message.get("content") or "")]), *calls])
        turns.append({"role": prose(message.get("role", "")), "text": prose(text)})
    return turns
