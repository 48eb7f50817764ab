"""Where a request keeps what it carries from window to window: on its own pages.

What is known after a whole window lies on the window's last page. That page is full only once all
of the window is, so whoever finds it in vLLM's prefix cache finds what all of the window gave. The
first page would not do: a shorter prompt may have left it behind with a part of the window only,
and the cache takes either for the same.

A window that a prompt leaves unfinished, and those that decoding begins, keep theirs on the first
page until the last one begins.
"""

from __future__ import annotations

from numba import njit

NOWHERE = -1


@njit(cache=True)
def carried(first, end, prefilling, window, page):  # type: ignore[no-untyped-def]
    """Where a window of a request finds what it goes on from, and where it leaves what it knows.

    Args:
        first: Its first token.
        end: The token behind its last.
        prefilling: Whether it is a part of the prompt; else it is one decoded token.
        window: Tokens of a whole window.
        page: Tokens per page; divides ``window``.

    Returns:
        Three logical pages. The first is where to read, NOWHERE at the start of a request. The
        other two are where to write, and may be the same one; NOWHERE for a decoded token that
        begins neither a window nor a window's last page, and so has nothing to move.
    """
    opening = first // window * (window // page)
    closing = opening + window // page - 1
    before = opening - 1 if opening > 0 else NOWHERE
    if not prefilling:
        if first % window == 0:
            return before, opening, opening
        if first == closing * page:
            return opening, closing, closing
        return opening, NOWHERE, NOWHERE
    if end - first == window:
        return before, closing, closing
    return before, opening, closing if (end - 1) // page == closing else opening
