"""How the data that pyllamabatch ships was made. Not part of the installed package."""
