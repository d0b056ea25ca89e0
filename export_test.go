package tableflip

// Reached is called at the steps of a handover.
var Reached = &reached
