"""The search page and its JSON API: `app` answers requests, `state` holds what they are answered from."""
