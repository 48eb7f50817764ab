"""The chat template of the bundled models, as Jinja text."""

from __future__ import annotations

# Contents are strings or OpenAI's list of parts. "What is X?" in the last user message makes the
# generation prompt "X is", so a model that can only continue text answers a plain chat request.
# Jinja has no regular expressions here: the text is cut at "what is" and the last piece with a
# question mark wins.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is not none -%}
{%- for part in content -%}
{%- if part is string -%}{{- part -}}
{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set last = namespace(user='', subject='') -%}
{%- for message in messages -%}
{%- set text = text_of(message['content']) -%}
{%- if message['role'] == 'user' -%}{%- set last.user = text -%}{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ text ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- set flat = (' ' ~ last.user)|lower|replace('\\n', ' ') -%}
{%- for piece in flat.split(' what is ')[1:] -%}
{%- if '?' in piece -%}{%- set last.subject = piece.split('?')[0]|trim -%}{%- endif -%}
{%- endfor -%}
{%- if last.subject -%}{{- last.subject ~ ' is' -}}{%- endif -%}
{%- endif -%}
"""
