#pragma once

#include "machine.h"

string report_launch(const Launch& launch);   // JSON
string report_error(const string& text);      // JSON
