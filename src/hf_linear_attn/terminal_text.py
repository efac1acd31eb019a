"""Text of a user, a file or a model, made safe for a terminal."""

# Control characters move the cursor, change colours and titles, or hide what stands before them. Their pictures have the same
# width; line ends and tabs stay. Halves of surrogate pairs cannot be written at all.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def printable(text: str) -> str:
    """The text with pictures in place of control characters, as many characters as before."""
    return text.translate(_PICTURES)
