"""Hugging Face folders: one rule table an architecture, read in both directions."""
