"""Arrays in, arrays out: decoding, quantizing, measuring, and the scratch memory that they work in. No files,
no plan."""
