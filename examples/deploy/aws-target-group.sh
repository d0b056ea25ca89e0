#!/bin/sh
# An AWS target group (ALB, NLB) whose targets are restarted or replaced without a
# refused request. Not run by a test, for want of AWS: the facts are those of its
# documentation, and what the service does on SIGTERM is tested with HAProxy.
#
#   aws-target-group.sh TARGET_GROUP_ARN
set -eu

# A target is left alone after two failed checks: 10 s, and the time of a check. Run
# web -delay 15s, and give what stops it more than the delay and the drain
# (TimeoutStopSec=, stopTimeout of an ECS container: 30 s unless set, 120 at most on
# Fargate).
aws elbv2 modify-target-group --target-group-arn "$1" \
	--health-check-path /health --health-check-interval-seconds 5 --health-check-timeout-seconds 2 \
	--unhealthy-threshold-count 2 --healthy-threshold-count 2

# Requests in progress on a target that was deregistered have that long. ECS and Auto
# Scaling deregister first, and an NLB needs a while to act on it: the delay, again.
aws elbv2 modify-target-group-attributes --target-group-arn "$1" \
	--attributes Key=deregistration_delay.timeout_seconds,Value=60
