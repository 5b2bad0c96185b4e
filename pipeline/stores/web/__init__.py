"""Files of web servers."""
