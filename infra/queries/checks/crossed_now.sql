-- Which books of the moment have a best YES bid that meets the best YES ask (1 − best NO bid)?
--
-- Only a suspicion: the book may be in the middle of one matching event, or not be verified.
SELECT market_ticker, yes_bid, yes_ask, last_event_ts
FROM top_of_book
WHERE yes_bid >= yes_ask
ORDER BY market_ticker
