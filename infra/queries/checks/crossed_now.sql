-- Which current books have a best YES bid at or above the best YES ask (1 − best NO bid)?
--
-- These are only candidates: a book may be in the middle of a matching event, or stale.
SELECT market_ticker, yes_bid, yes_ask, last_event_ts
FROM top_of_book
WHERE yes_bid >= yes_ask
ORDER BY market_ticker
