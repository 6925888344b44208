"""Records become numbers, tables, figures and a page. Nothing here trains."""
