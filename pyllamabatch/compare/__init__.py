"""The four ways to serve N users, side by side: `pyllamabatch compare`."""
