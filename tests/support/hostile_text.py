"""Text as a tenant may write it, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

# What terminals, Markdown, Rich and line readers take for more than text.
HOSTILE_PARTS = (
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1b]0;title\x1b\\",
    "\x1b[2J",
    "\x9b31m",
    "\x9d8;;http://evil.example\x9c",
    "\x1bPq#0\x1b\\",
    "\x1b",
    "\u202egpj.exe",
    "\u2066",
    "\u200b",
    "\u2028",
    "\x85",
    "\r",
    "\n",
    "\t",
    "\0",
    "`",
    "```",
    "```\n",
    "<img src=x onerror=alert(1)>",
    "<!-- ",
    "![a](http://evil.example/a.png)",
    "[a](javascript:alert(1))",
    "[a]: http://evil.example",
    "<http://evil.example>",
    "http://evil.example",
    "www.evil.example",
    "a@evil.example",
    "| a | b |\n| - | - |",
    "# heading",
    "* item",
    "> quote",
    "&lt;b&gt;",
    "\\",
    "[bold]",
    "[link=http://evil.example]",
    "[/]",
    ":warning:",
    "@tm@ ready 1 0",
)

hostile_text = st.lists(st.one_of(st.sampled_from(HOSTILE_PARTS), st.text()), max_size=8).map(
    "".join
)
hostile_bytes = st.one_of(
    st.binary(max_size=200),
    hostile_text.map(lambda text: text.encode(errors="surrogatepass")),
)
