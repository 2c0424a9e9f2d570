"""The HTTP server: shapes of other vendors end here, and a Request begins."""
