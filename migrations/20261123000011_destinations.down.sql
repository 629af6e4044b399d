DROP FUNCTION forget_destinations;
DROP FUNCTION lease_destinations;
