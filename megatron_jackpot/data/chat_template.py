"""Chat templates as transformers renders them, with the clock of the run in place of the wall's."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """{% generation %}, by which a template marks an assistant's words: here just what stands inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Messages -> the text of a prompt that the assistant is to answer."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        arguments: Mapping[str, Any],
        now: datetime.datetime,
    ) -> None:
        """`arguments` are data.template_args, `now` what strftime_now shows. Raises ValueError for a template
        that jinja cannot read."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = now.strftime
        # A run's prompts are the same when it goes on.
        del environment.filters["random"], environment.globals["lipsum"]
        # What transformers hands to every template, so that "is defined" reads the same.
        given = {**special_tokens, "add_generation_prompt": True, "tools": None, "documents": None}
        self.variables = {**given, **arguments}
        try:
            self.template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template cannot be read: {error}. Set data.template.") from error

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Raises ValueError with what the template says of messages that it does not take."""
        try:
            return self.template.render(messages=messages, **self.variables)
        except Exception as error:
            # A template is a program of someone else's: 1/0, a range too long.
            raise ValueError(f"the chat template refuses it: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
