"""GNU tar, so that it keeps all that ext4 can hold."""

from __future__ import annotations

TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--blocking-factor=512")
