"""Run as a program: moto's S3 on loopback that checks every request's signature.

moto checks the signatures of headers, but takes a presigned URL for a request without one; so the
signature and the expiry of these are checked here, and what is sound goes on under a header.
"""

import logging
import os
import sys
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlencode

os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.core import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

CREDENTIALS = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
EVERYTHING = """{"Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}"""


def make_user():
    """The only user, who may do everything, with the keys of CREDENTIALS."""
    backend = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_user(None, "tester")
    backend.put_user_policy("tester", "everything", EVERYTHING)
    key = backend.create_access_key("tester")
    key.access_key_id = CREDENTIALS.access_key
    key.secret_access_key = CREDENTIALS.secret_key


def is_sound(environ, query):
    """Whether a presigned URL has its own signature and has not expired."""
    signed = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if datetime.now(UTC) > signed + timedelta(seconds=int(query["X-Amz-Expires"])):
        return False
    unsigned = {name: value for name, value in query.items() if name != "X-Amz-Signature"}
    request = AWSRequest(environ["REQUEST_METHOD"], url(environ) + "?" + urlencode(unsigned))
    request.context["timestamp"] = query["X-Amz-Date"]
    _, _, region, service, _ = query["X-Amz-Credential"].split("/")
    auth = S3SigV4QueryAuth(CREDENTIALS, service, region)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    return auth.signature(text, request) == query["X-Amz-Signature"]


def url(environ):
    return f"http://{environ['HTTP_HOST']}{environ['RAW_URI'].partition('?')[0]}"


def checked(app):
    """A WSGI application behind the check of presigned URLs."""

    def answer(environ, start_response):
        query = dict(parse_qsl(environ["QUERY_STRING"]))
        if "X-Amz-Date" in query:
            try:
                sound = is_sound(environ, query)
            except (KeyError, ValueError):
                sound = False
            if not sound:
                start_response("403 Forbidden", [("Content-Length", "0")])
                return [b""]
            request = AWSRequest(environ["REQUEST_METHOD"], url(environ))
            S3SigV4Auth(CREDENTIALS, "s3", "us-east-1").add_auth(request)
            for name, value in request.headers.items():
                environ["HTTP_" + name.upper().replace("-", "_")] = value
            environ["QUERY_STRING"] = ""
            environ["RAW_URI"] = environ["REQUEST_URI"] = environ["RAW_URI"].partition("?")[0]
        return app(environ, start_response)

    return answer


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    make_user()
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", 0, checked(app), threaded=True, request_handler=MotoRequestHandler)
