"""The demo's report: facts (what is read), charts and numbers (what is shown), page (the document)."""
