"""A dataset as one HTML page for people: what the run did, what its rows look like, and a few traces token by token.

    facts    what the page shows, as records
    viewed   one trace, with the target's distribution at every supervised token
    collect  a dataset -> facts
    page     facts -> one self-contained file (page.html, page.css, and four scripts)

The page needs no network and carries its data with it, so it can be mailed and opened years later. The trade-off: it
shows a few traces and not all of them, and figures of a large dataset are sums of its records, not of its rows.
"""
