"""The wire protocol, sans-IO: frames, messages, coding of vectors, chunked transfers, topics."""
